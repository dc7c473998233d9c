"""Words with BIO tags: reading, checking, and alignment with a tokenizer's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .faults import Faults, RowFault
from .labels import some
from .splits import joined
from .tables import require_column

if TYPE_CHECKING:
    from datasets import Dataset

#: The tag of a word in no entity, and the label of ignored tokens: special tokens, and all but a word's first.
OUTSIDE, UNLABELLED = "O", -100
_BIO = re.compile(r"O|[BI]-.+")


def text_columns(recipe: Recipe) -> list[str]:
    """The columns with the words and with their tags."""
    return [recipe.data.columns.tokens or "tokens", recipe.data.columns.tags or "tags"]


def words_in(cell: Any) -> Any:
    """The words (or tags) of one row: a list unchanged, a text split at its blanks."""
    return cell.split() if isinstance(cell, str) else cell


def load(
    recipe: Recipe, trains: Sequence[Dataset], validation: Dataset | None, notes: list[str]
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Columns `tokens` and `label` (places among the tags) of both tables, and the tags' names.

    The names are `data.label_names`, those of a hub data set, or O and, for every kind of entity, B- and I-. Raises
    DataError for rows that aren't in BIO (all at once), no entity at all, and tags that the training data lack.
    """
    sources = recipe.data.sources
    parts = [_read(recipe, table, source, notes) for table, source in zip(trains, sources, strict=True)]
    names = _declared_names(recipe, trains[0]) or _names([row for rows in parts for row in rows], recipe.data.train)
    train = joined([_assemble(rows, names, source) for rows, source in zip(parts, sources, strict=True)], sources)
    if validation is not None:
        validation = among(recipe, validation, names, recipe.data.scored, notes)
    return train, validation, names


def among(recipe: Recipe, table: Dataset, names: list[str], source: str, notes: list[str]) -> Dataset:
    """Like `load`, for one table whose tags are `names`."""
    return _assemble(_read(recipe, table, source, notes), names, source)


def class_names(recipe: Recipe, train: Dataset, source: str) -> list[str]:
    """The names of the tags of a training table."""
    return _declared_names(recipe, train) or _names(_read(recipe, train, source, []), source)


def _names(rows: Sequence[Any], source: str) -> list[str]:
    kinds = sorted({tag[2:] for _, tags in rows for tag in tags if tag != OUTSIDE})
    if not kinds:
        raise DataError(
            f"data.columns.tags: every word of {source} is tagged {OUTSIDE}, so there is no entity to learn"
        )
    return [OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]


def _declared_names(recipe: Recipe, table: Dataset) -> list[str] | None:
    inner = getattr(table.features.get(text_columns(recipe)[1]), "feature", None)
    return recipe.data.label_names or getattr(inner, "names", None)


def _read(recipe: Recipe, table: Dataset, source: str, notes: list[str]) -> list[tuple[list[str], list[str]]]:
    for key, column in zip(("tokens", "tags"), text_columns(recipe), strict=True):
        require_column(table, column, f"data.columns.{key}", source)
    faults, cells = Faults(source, len(table)), zip(*(table[column] for column in text_columns(recipe)), strict=True)
    names = _declared_names(recipe, table)
    rows = faults.each(cells, lambda row: _row(words_in(row[0]), words_in(row[1]), names))
    notes += faults.settle(table, recipe.data.drop_missing)[1]
    return list(rows.values())


def _row(words: Any, tags: Any, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    if not words or not tags:
        raise RowFault("no words, or no tags", gap=True)
    if not isinstance(words, list) or not isinstance(tags, list):
        raise RowFault("a list of words and a list of tags are needed, or texts with blanks between them")
    if len(words) != len(tags):
        raise RowFault("the numbers of words and of tags differ")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise RowFault("a word is empty, or no text")
    if names is not None:
        tags = [names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag for tag in tags]
    before = OUTSIDE
    for tag in tags:
        if not isinstance(tag, str) or not _BIO.fullmatch(tag):
            raise RowFault(f"{tag!r} is no BIO tag: O, B-<kind> or I-<kind>")
        if tag[0] == "I" and tag[2:] != before[2:]:
            raise RowFault(f"{tag} follows {before}: an entity begins with B-")
        before = tag
    return words, tags


def _assemble(rows: Sequence[Any], names: list[str], source: str) -> Dataset:
    from datasets import Dataset

    place = {name: index for index, name in enumerate(names)}
    unknown = sorted({tag for _, tags in rows for tag in tags if tag not in place})
    if unknown:
        raise DataError(f"data.columns.tags: {source} has {some(unknown)}; known: {some(names)}")
    labels = [[place[tag] for tag in tags] for _, tags in rows]
    return Dataset.from_dict({"tokens": [words for words, _ in rows], "label": labels})


def encode_words(
    rows: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Any]], list[list[int | None]], list[int]]:
    """Token ids as columns; for each token its word if it is the word's first, else None; row lengths before the
    cut."""
    rows, how = list(rows), {"is_split_into_words": True, "verbose": False}
    lengths = [len(ids) for ids in tokenizer(rows, truncation=False, **how)["input_ids"]]  # type: ignore[arg-type]
    encoded = tokenizer(rows, truncation=True, max_length=max_length, **how)  # type: ignore[arg-type]
    firsts = []
    for index in range(len(rows)):
        words = encoded.word_ids(index)
        firsts.append([None if word in words[:place] else word for place, word in enumerate(words)])
    return {name: encoded[name] for name in encoded if name != "attention_mask"}, firsts, lengths


def encode_tagged(
    table: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Any]], list[int]]:
    """Token ids and labels as columns, and the number of tokens of each row; the first token of a word is labelled."""
    columns, firsts, lengths = encode_words(list(table["tokens"]), tokenizer, max_length)
    columns["labels"] = [
        [UNLABELLED if word is None else labels[word] for word in row]
        for row, labels in zip(firsts, table["label"], strict=True)
    ]
    return columns, lengths
