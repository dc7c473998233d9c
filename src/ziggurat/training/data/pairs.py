"""The token ids of preference data, under the names of TRL's trainers, cut to one length."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ziggurat.recipe.schema import Recipe

from .encode import Encoded, percentile, spread
from .examples import Examples
from .prefer import worse_of
from .tokens import Row, length_of, tell_of_cuts, tokens_of


def encode_pairs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, examples: Examples) -> Encoded:
    """Training and validation pairs as `prompt_ids`, `chosen_ids` and `rejected_ids`; otherwise like `encode_rows`."""
    notes: list[str] = []
    parts = []
    for table, word in examples.parts:
        pair = [tokens_of(recipe, tokenizer, part, word, notes) for part in (table, worse_of(table))]
        parts.append(([_split(*rows) for rows in zip(*pair, strict=True)], word))
    return _cut(recipe, tokenizer, config, parts, ("chosen_ids", "rejected_ids"), notes)


def encode_judged(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, examples: Examples) -> Encoded:
    """Judged answers as `prompt_ids`, `completion_ids` and `label`; otherwise like `encode_rows`.

    They are shuffled with the seed, since TRL's KTOTrainer keeps their order.
    """
    notes: list[str] = []
    parts = []
    for table, word in examples.parts:
        table = table.shuffle(seed=recipe.seed)
        rows = zip(tokens_of(recipe, tokenizer, table, word, notes), list(table["good"]), strict=True)
        parts.append(([(*_split(row), good) for row, good in rows], word))
    return _cut(recipe, tokenizer, config, parts, ("completion_ids", "label"), notes)


def _split(*rows: Row) -> tuple[list[int], ...]:
    """The common start of the rows before their answers, and each answer."""
    start = min(mask.index(1) for _, mask in rows)
    ends = [len(mask) - mask[::-1].index(1) for _, mask in rows]
    return rows[0][0][:start], *(ids[start:end] for (ids, _), end in zip(rows, ends, strict=True))


def _cut(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    parts: list[tuple[list[Any], str]],
    names: tuple[str, ...],
    notes: list[str],
) -> Encoded:
    """The rows whose prompt leaves room for an answer; DataError if there are none. TRL cuts the answers themselves."""
    from datasets import Dataset

    def size(row: Any) -> int:
        return len(row[0]) + max(len(part) for part in row[1:] if isinstance(part, list))

    lengths = [size(row) for row in parts[0][0]]
    notes.append(spread(lengths, "training rows"))
    length = length_of(recipe, tokenizer, config, percentile(lengths, 95), notes)
    made = []
    for rows, word in parts:
        fitting = [row for row in rows if len(row[0]) < length]
        cut, gone = sum(size(row) > length for row in rows), len(rows) - len(fitting)
        tell_of_cuts(recipe, length, word, len(rows), cut, gone, gone, notes)
        columns = {name: [row[place] for row in fitting] for place, name in enumerate(("prompt_ids", *names))}
        made.append(Dataset.from_dict(columns))
    return Encoded(made[0], made[1], length, notes)
