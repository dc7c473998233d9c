"""Rows with a label: their texts and labels, checked, and the classes' names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ziggurat.recipe.glue import glue_name
from ziggurat.recipe.schema import Recipe

from .faults import Faults, RowFault, kind_of
from .labels import check_label, labels_among, labels_of, names_of
from .readers import has_head_line
from .splits import ORIGIN, joined
from .tables import require_column

if TYPE_CHECKING:
    from datasets import Dataset


def load(
    recipe: Recipe, trains: Sequence[Dataset], validation: Dataset | None, notes: list[str]
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Columns `text`, `text_pair` (if two) and `label` of the training and validation rows, and the classes' names.

    Raises DataError for rows that can't be used (all of a file at once), and as `labels_of` does.
    """
    data = recipe.data
    parts = [_checked(recipe, table, source, notes) for table, source in zip(trains, data.sources, strict=True)]
    if len(parts) > 1:
        used = [column for column in (data.text, data.text_pair, data.label) if column is not None]
        if len({str(table.features[data.label]) for table in parts}) > 1:
            parts = [_with_names(table, data.label) for table in parts]
        parts = [table.select_columns(used) for table in parts]
    tables = [joined(parts, data.sources)]
    if validation is not None:
        tables.append(_checked(recipe, validation, data.scored, notes))
    names, labels = labels_of(recipe, tables, data.train)
    train, *others = (_assemble(recipe, table, label) for table, label in zip(tables, labels, strict=True))
    return train, others[0] if others else None, names


def among(recipe: Recipe, table: Dataset, names: list[str], source: str, notes: list[str]) -> Dataset:
    """Like `load`, for one table and the classes `names` of a trained model."""
    table = _checked(recipe, table, source, notes)
    return _assemble(recipe, table, labels_among(recipe, table, names, source))


def class_names(recipe: Recipe, train: Dataset, source: str) -> list[str]:
    """The names of the classes of a training table, whose texts aren't read."""
    require_column(train, recipe.data.label, "data.label", source)
    faults = Faults(source, len(train))
    faults.each(train[recipe.data.label], partial(check_label, recipe))
    return names_of(recipe, faults.settle(train, recipe.data.drop_missing)[0], source)


def text_columns(recipe: Recipe) -> list[str]:
    """The columns that hold texts."""
    return [column for column in (recipe.data.text, recipe.data.text_pair) if column is not None]


def _with_names(table: Dataset, column: str) -> Dataset:
    """A table with class names in the place of a hub data set's numbers, as in other files."""
    names = getattr(table.features[column], "names", None)
    if names is None:
        return table
    values = [None if value is None else names[value] for value in table[column]]
    return table.remove_columns(column).add_column(column, values)


def _checked(recipe: Recipe, table: Dataset, source: str, notes: list[str]) -> Dataset:
    """The usable rows of a table; `notes` gets the number left out. Raises DataError that counts all others."""
    data = recipe.data
    texts = {"data.text": data.text} | ({"data.text_pair": data.text_pair} if data.text_pair is not None else {})
    for key, column in [*texts.items(), ("data.label", data.label)]:
        require_column(table, column, key, source)
    faults = Faults(source, len(table))
    # GLUE is scored as it was published, and a few questions of QQP are empty.
    for key, column in texts.items() if glue_name(data.train, data.subset) is None else ():
        faults.each(table[column], partial(_check_text, f"column '{column}' ({key})"))
    faults.each(table[data.label], partial(check_label, recipe))
    table, left_out = faults.settle(table, data.drop_missing)
    notes += left_out
    if recipe.task == "classification" and has_head_line(source) and data.label in set(table[data.label]):
        notes.append(
            f"{source}: its column '{data.label}' is called as one of its labels; if the file has no head line, its "
            "first row is taken for one and lost: write the columns' names above it"
        )
    return table


def _check_text(where: str, text: Any) -> None:
    if text is None or not str(text).strip():
        raise RowFault(f"no text in {where}", gap=True)
    if isinstance(text, list | dict | bytes):
        raise RowFault(f"{where}: a text is needed, this is {kind_of(text)}")


def _assemble(recipe: Recipe, table: Dataset, labels: list[Any]) -> Dataset:
    from datasets import Dataset

    made = {"text": _texts(table[recipe.data.text]), "label": labels}
    if recipe.data.text_pair is not None:
        made["text_pair"] = _texts(table[recipe.data.text_pair])
    if ORIGIN in table.column_names:
        made[ORIGIN] = list(table[ORIGIN])
    return Dataset.from_dict(made)


def _texts(values: Any) -> list[str]:
    """Texts; empty ones for missing texts of GLUE, which aren't checked."""
    return ["" if value is None else str(value) for value in values]
