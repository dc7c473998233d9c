"""Source and target texts, for models with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .chat import as_text
from .encode import Encoded, percentile, spread
from .examples import Examples
from .faults import Faults, RowFault
from .instruct import ALIASES, column_of
from .tokens import length_of

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("source", "target")


def to_sources(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, str, list[str]]:
    """The rows as texts `source` and `target`.

    Raises DataError for missing columns and, counted together, for all rows that lack a text.
    """
    from datasets import Dataset

    columns = {name: column_of(recipe, name, table, source) for name in _COLUMNS}
    lacking = [name for name, column in columns.items() if column is None]
    if lacking:
        usual = "; ".join(f"{name}: {' or '.join(ALIASES[name])}" for name in lacking)
        raise DataError(
            f"{source} has the columns {', '.join(table.column_names)}, and {recipe.task} needs a source and a target "
            f"({usual}); name the column in data.columns.{lacking[0]}"
        )
    faults, cells = Faults(source, len(table)), zip(*(table[str(column)] for column in columns.values()), strict=True)
    rows = faults.each(cells, _texts)
    _, notes = faults.settle(table, recipe.data.drop_missing)
    return Dataset.from_list([{**row, "row": number} for number, row in rows.items()]), "source", notes


def _texts(cells: tuple[Any, Any]) -> dict[str, str]:
    texts = {name: as_text(cell) or "" for name, cell in zip(_COLUMNS, cells, strict=True)}
    for name, text in texts.items():
        if not text.strip():
            raise RowFault(f"the {name} is empty", gap=True)
    return texts


def source_ids(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int | None = None
) -> list[list[int]]:
    """Token ids of sources after `data.prefix`, of at most `length` tokens."""
    return _ids(tokenizer, length, text=[recipe.data.prefix + text for text in texts])


def target_ids(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int | None = None
) -> list[list[int]]:
    """Token ids of targets, of at most `length` tokens."""
    return _ids(tokenizer, length, text_target=list(texts))


def _ids(tokenizer: PreTrainedTokenizerBase, length: int | None, **texts: list[str]) -> list[list[int]]:
    cut: dict[str, Any] = {} if length is None else {"truncation": True, "max_length": length}
    return tokenizer(**texts, verbose=False, **cut)["input_ids"]


#: Column of `to_sources` -> the function for its ids, the model's name for them, and the key of their maximum length.
_ENCODED = {"source": (source_ids, "input_ids", "max_length"), "target": (target_ids, "labels", "max_target")}


def encode_sources(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, examples: Examples) -> Encoded:
    """Training and validation rows as `input_ids` and `labels`, the most tokens of a target, and notes.

    The notes say how long both are, and how many are cut.
    """
    from datasets import Dataset

    notes: list[str] = []
    limits: dict[str, int] = {}
    made = []
    for table, word in examples.parts:
        columns = {}
        for name, (ids, column, key) in _ENCODED.items():
            lengths = [len(row) for row in ids(recipe, tokenizer, table[name])]
            if word == "training":
                notes.append(spread(lengths, f"training {name}s"))
                limits[name] = length_of(recipe, tokenizer, config, percentile(lengths, 95), notes, key=key)
            if cut := sum(length > limits[name] for length in lengths):
                notes.append(f"{cut} of {len(table)} {word} {name}s are longer than {limits[name]} tokens and were cut")
            columns[column] = ids(recipe, tokenizer, table[name], limits[name])
        made.append(Dataset.from_dict(columns))
    return Encoded(made[0], made[1], limits["target"], notes)
