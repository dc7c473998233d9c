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


def tag_columns(recipe: Recipe) -> tuple[str, str]:
    """The columns with the words and with their tags."""
    return recipe.data.columns.tokens or "tokens", recipe.data.columns.tags or "tags"


def words_in(cell: Any) -> Any:
    """The words (or tags) of one row: a list unchanged, a text split at its blanks."""
    return cell.split() if isinstance(cell, str) else cell


def load_tagged(
    recipe: Recipe, trains: Sequence[Dataset], validation: Dataset | None, notes: list[str]
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Columns `tokens` and `label` (places among the tags) of both tables, and the tags' names.

    The names are `data.label_names`, those of a hub data set, or O and, for every kind of entity, B- and I-. Raises
    DataError for rows that aren't in BIO (all at once), no entity at all, and tags that the training data lack.
    """
    sources = [recipe.data.train, *(recipe.data.more or [])]
    parts = [_read(recipe, table, source) for table, source in zip(trains, sources, strict=True)]
    notes += [note for _, remarks in parts for note in remarks]
    names = tag_names(recipe, trains[0], [row for rows, _ in parts for row in rows], recipe.data.train)
    built = joined([_assemble(rows, names, source) for (rows, _), source in zip(parts, sources, strict=True)], sources)
    if validation is None:
        return built, None, names
    source = recipe.data.validation or recipe.data.train
    return built, tagged_among(recipe, validation, names, source, notes), names


def tagged_among(recipe: Recipe, table: Dataset, names: list[str], source: str, notes: list[str]) -> Dataset:
    """The same for a table whose tags are `names`."""
    rows, remarks = _read(recipe, table, source)
    notes += remarks
    return _assemble(rows, names, source)


def tag_names(recipe: Recipe, table: Dataset, rows: Sequence[Any] | None, source: str) -> list[str]:
    """The names of the tags of a training table; `rows`, if they have been read."""
    given = _given(recipe, table)
    if given is not None:
        return given
    rows = rows if rows is not None else _read(recipe, table, source)[0]
    kinds = sorted({tag[2:] for _, tags in rows for tag in tags if tag != OUTSIDE})
    if not kinds:
        raise DataError(
            f"data.columns.tags: every word of {source} is tagged {OUTSIDE}, so there is no entity to learn"
        )
    return [OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]


def _given(recipe: Recipe, table: Dataset) -> list[str] | None:
    column = tag_columns(recipe)[1]
    inner = getattr(table.features.get(column), "feature", None)
    return recipe.data.label_names or getattr(inner, "names", None)


def _read(recipe: Recipe, table: Dataset, source: str) -> tuple[list[tuple[list[str], list[str]]], list[str]]:
    columns = tag_columns(recipe)
    for key, column in zip(("tokens", "tags"), columns, strict=True):
        require_column(table, column, f"data.columns.{key}", source)
    given, faults, rows = _given(recipe, table), Faults(source, len(table)), []
    for index, (words, tags) in enumerate(zip(*(table[column] for column in columns), strict=True)):
        with faults.of_row(index):
            rows.append(_row(words_in(words), words_in(tags), given))
    return rows, faults.settle(table, recipe.data.drop_missing)[1]


def _row(words: Any, tags: Any, given: Sequence[str] | None) -> tuple[list[str], list[str]]:
    if not words or not tags:
        raise RowFault("no words, or no tags", gap=True)
    if not isinstance(words, list) or not isinstance(tags, list):
        raise RowFault("a list of words and a list of tags are needed, or texts with blanks between them")
    if len(words) != len(tags):
        raise RowFault("words and tags differ in number")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise RowFault("a word is empty, or no text")
    if given is not None:
        tags = [given[tag] if isinstance(tag, int) and 0 <= tag < len(given) else tag for tag in tags]
    before = OUTSIDE
    for tag in tags:
        if not isinstance(tag, str) or not _BIO.fullmatch(tag):
            raise RowFault(f"{tag!r} is no BIO tag: O, B-<kind> or I-<kind>")
        if tag[0] == "I" and tag[2:] != before[2:]:
            raise RowFault(f"{tag} stands behind {before}: an entity begins with B-")
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
    """Token ids and labels as columns, and how many tokens each row had; the first token of a word is labelled."""
    columns, firsts, lengths = encode_words(list(table["tokens"]), tokenizer, max_length)
    columns["labels"] = [
        [UNLABELLED if word is None else labels[word] for word in row]
        for row, labels in zip(firsts, table["label"], strict=True)
    ]
    return columns, lengths
