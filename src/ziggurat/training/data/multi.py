"""Several labels per row: lists, or texts with a separator, as a 0 or 1 for each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .faults import Faults, kind_of
from .labels import check_class_values, classes_of, places_of

if TYPE_CHECKING:
    from datasets import Dataset


def labels_in(cell: Any, separator: str | None) -> list[Any]:
    """The labels of one row: a list unchanged, a text split at the separator, or a single label."""
    if isinstance(cell, str) and separator is not None:
        return [part.strip() for part in cell.split(separator) if part.strip()]
    return cell if isinstance(cell, list) else [cell]


def check_sets(recipe: Recipe, values: Iterable[Any], faults: Faults) -> None:
    """Note every value that is neither a list of classes nor a text with the separator; an empty list is allowed."""
    column, separator = recipe.data.label, recipe.data.label_separator
    for index, value in enumerate(values):
        if value is None:
            faults.add(index, f"nothing in column '{column}'; a row without labels has an empty list", gap=True)
        elif isinstance(value, str) and separator is None:
            faults.add(
                index,
                f"a text in column '{column}': set data.label_separator to the text between its labels, or write lists",
            )
        elif isinstance(value, dict | bytes):
            faults.add(index, f"column '{column}': a list of classes is needed, this is {kind_of(value)}")
        else:
            of_row = Faults("", 1)
            check_class_values(labels_in(value, separator), column, of_row)
            for what in of_row.kinds:
                faults.add(index, what)


def one_a_row(recipe: Recipe, table: Dataset) -> tuple[Dataset, list[int]]:
    """All labels of a checked table in one column, and how many each row has."""
    from datasets import Dataset, Features

    column = recipe.data.label
    rows = [labels_in(cell, recipe.data.label_separator) for cell in table[column]]
    inner = getattr(table.features[column], "feature", None)
    features: Any = Features({column: inner}) if hasattr(inner, "names") else None
    flat = {column: [label for row in rows for label in row]}
    return Dataset.from_dict(flat, features=features), [len(row) for row in rows]


def sets_of(recipe: Recipe, tables: Sequence[Dataset], source: str) -> tuple[list[str], list[list[list[float]]]]:
    """Names of the classes, and for each row of each table 1 for the classes that it has, else 0; see `classes_of`.

    Raises DataError as `classes_of` does, and for fewer than two classes.
    """
    parts = [one_a_row(recipe, table) for table in tables]
    names, places = classes_of(recipe, [flat for flat, _ in parts], source)
    if len(names) < 2:
        raise DataError(
            f"data.label: column '{recipe.data.label}' of {source} has {len(names)} classes, and multilabel needs two "
            "at least; data.label_separator is the text between the labels of a row"
        )
    return names, [_hot(part, counts, len(names)) for part, (_, counts) in zip(places, parts, strict=True)]


def sets_among(recipe: Recipe, table: Dataset, names: Sequence[str], source: str) -> list[list[float]]:
    """The same for a table whose classes are `names`, those of a trained model; see `places_of`."""
    flat, counts = one_a_row(recipe, table)
    return _hot(places_of(recipe, list(flat[recipe.data.label]), names, source), counts, len(names))


def _hot(places: Sequence[int], counts: Sequence[int], classes: int) -> list[list[float]]:
    rows, left = [], iter(places)
    for count in counts:
        mine = {next(left) for _ in range(count)}
        rows.append([float(place in mine) for place in range(classes)])
    return rows


def rarest(rows: Sequence[Sequence[float]]) -> list[int | None]:
    """The rarest class of each row, so that a split can keep one row of each in training."""
    sets = [[place for place, there in enumerate(row) if there] for row in rows]
    counts = Counter(place for places in sets for place in places)
    return [min(places, key=lambda place: counts[place], default=None) for places in sets]
