"""The labels of scored tasks: numbers, or classes by their names, in one order for all tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .faults import RowFault, kind_of

if TYPE_CHECKING:
    from datasets import Dataset


def check_label(recipe: Recipe, value: Any) -> None:
    """Raises RowFault for a value that can't be a label of the recipe's task."""
    column, separator = recipe.data.label, recipe.data.label_separator
    if recipe.task == "classification":
        _check_class(value, column)
    elif recipe.task == "regression":
        if value is None or value == "":
            raise RowFault(f"no number in column '{column}'", gap=True)
        if number_of(value) is None:
            raise RowFault(f"{value!r} in column '{column}' is no number, which regression needs")
    elif value is None:
        raise RowFault(f"nothing in column '{column}'; a row without labels has an empty list", gap=True)
    elif isinstance(value, str) and separator is None:
        problem = (
            f"a text in column '{column}': set data.label_separator to the text between its labels, or write lists"
        )
        raise RowFault(problem)
    elif isinstance(value, dict | bytes):
        raise RowFault(f"column '{column}': a list of classes is needed, this is {kind_of(value)}")
    else:
        for label in _classes_in(recipe, value):
            _check_class(label, column, gap=False)


def _check_class(value: Any, column: str, gap: bool = True) -> None:
    """Raises RowFault for a value that can't name a class; `gap`: a row without one may be left out."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowFault(f"no label in column '{column}'", gap=gap)
    if isinstance(value, float) and not value.is_integer():
        raise RowFault(f"{value} in column '{column}' is no class; for numbers set task: regression")
    if isinstance(value, list | dict | bytes):
        raise RowFault(f"column '{column}': one class is needed, this is {kind_of(value)}")


def number_of(value: Any) -> float | None:
    """A label as a finite number; None if it isn't one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _classes_in(recipe: Recipe, cell: Any) -> list[Any]:
    """The classes of one row. For multilabel a list unchanged, or a text split at the separator."""
    separator = recipe.data.label_separator
    if recipe.task != "multilabel":
        return [cell]
    if isinstance(cell, str) and separator is not None:
        return [part.strip() for part in cell.split(separator) if part.strip()]
    return cell if isinstance(cell, list) else [cell]


@dataclass
class _Classes:
    """The checked classes of a table, row after row in one list, and their number in each row.

    `names`: the class names of a hub data set, whose labels are indices into them.
    """

    values: list[Any]
    sizes: list[int]
    names: list[str] | None

    @classmethod
    def of(cls, recipe: Recipe, table: Dataset) -> _Classes:
        rows = [_classes_in(recipe, cell) for cell in table[recipe.data.label]]
        kind = table.features[recipe.data.label]
        values = _of_one_kind(label for row in rows for label in row)
        return cls(values, [len(row) for row in rows], getattr(getattr(kind, "feature", kind), "names", None))

    def labels(self, recipe: Recipe, places: Iterable[int], classes: int) -> list[Any]:
        """Each row's place among the classes, or for multilabel 1 for each class that it has, else 0."""
        places = iter(places)
        rows = [set(islice(places, size)) for size in self.sizes]
        if recipe.task != "multilabel":
            return [place for (place,) in rows]
        return [[float(place in row) for place in range(classes)] for row in rows]


def labels_of(recipe: Recipe, tables: Sequence[Dataset], source: str) -> tuple[list[str], list[list[Any]]]:
    """Names of the classes, and each table's labels by them; the first table, `source`, is for training.

    A label is an index into the names, for multilabel a 0 or 1 for each name; for regression, without names, a number.
    Raises DataError for labels that the names or the training data lack, for columns that hold no classes, and for
    fewer than two classes of multilabel.
    """
    if recipe.task == "regression":
        return [], [[number_of(value) for value in table[recipe.data.label]] for table in tables]
    parts = [_Classes.of(recipe, table) for table in tables]
    names, places = _places(recipe, parts, source)
    if recipe.task == "multilabel" and len(names) < 2:
        raise DataError(
            f"data.label: column '{recipe.data.label}' of {source} has {len(names)} classes, and multilabel needs two "
            "at least; data.label_separator is the text between the labels of a row"
        )
    return names, [part.labels(recipe, of_part, len(names)) for part, of_part in zip(parts, places, strict=True)]


def labels_among(recipe: Recipe, table: Dataset, names: Sequence[str], source: str) -> list[Any]:
    """The labels of a table by the classes `names` of a trained model.

    Classes go by their names; whole numbers that name none, or that `data.label_names` gives names to, are indices
    from 0. Labels that differ by case or blanks alone are one class if the recipe merges them. Raises DataError for
    classes that the model doesn't know.
    """
    if recipe.task == "regression":
        return labels_of(recipe, [table], source)[1][0]
    classes = _Classes.of(recipe, table)
    values = classes.values
    places: dict[Any, int] = {name: place for place, name in enumerate(names)}
    numbers = bool(values) and not any(isinstance(value, str) for value in values)
    if numbers and (recipe.data.label_names is not None or not any(str(value) in places for value in values)):
        places = {place: place for place in range(len(names))}
    elif recipe.data.similar_labels == "merge":
        places |= {_plain(name): place for place, name in enumerate(names)}
        values = [value if value in places else _plain(str(value)) for value in values]
    else:
        values = [str(value) for value in values]
    unknown = sorted({str(value) for value in values if value not in places})
    if unknown:
        raise DataError(
            f"data.label: {source} has {some(unknown)} in column '{recipe.data.label}', which the model does not know; "
            f"it knows {some(names)}"
        )
    return classes.labels(recipe, [places[value] for value in values], len(names))


def names_of(recipe: Recipe, train: Dataset, source: str) -> list[str]:
    """The classes of the training data alone, as `labels_of` finds them."""
    return _places(recipe, [_Classes.of(recipe, train)], source)[0]


def _of_one_kind(values: Iterable[Any]) -> list[Any]:
    """Checked labels of one kind: whole numbers, or texts if one is a text."""
    labels = [int(value) if isinstance(value, float) else value for value in values]
    kinds = {isinstance(value, str) for value in labels}
    return [str(value) for value in labels] if len(kinds) > 1 else labels


def _one_spelling(recipe: Recipe, parts: Sequence[_Classes]) -> None:
    """Merge labels that differ only by case or blanks, in place, if `data.similar_labels` is `merge`.

    They take the spelling of `data.label_names`, or the most frequent one. Raises DataError, which lists them all, if
    the recipe doesn't set `data.similar_labels`.
    """
    names = recipe.data.label_names or []
    counts = Counter(value for part in parts for value in part.values if isinstance(value, str))
    spellings: dict[str, list[str]] = {}
    for value in dict.fromkeys([*names, *counts]):
        spellings.setdefault(_plain(value), []).append(value)
    similar = [values for values in spellings.values() if len(values) > 1]
    if not similar or recipe.data.similar_labels == "keep":
        return
    if recipe.data.similar_labels is None:
        shown = "; ".join(
            " and ".join(f"{value!r} ({counts[value]} row{'s' if counts[value] != 1 else ''})" for value in values)
            for values in similar[:6]
        )
        raise DataError(
            f"data.label: labels in column '{recipe.data.label}' differ by case or blanks alone: {shown}; set "
            "data.similar_labels to merge (one class, by its most frequent spelling) or keep (a class each)"
        )
    spelling_of = {
        value: next((name for name in values if name in names), max(values, key=lambda value: counts[value]))
        for values in similar
        for value in values
    }
    for part in parts:
        part.values = [spelling_of.get(value, value) for value in part.values]


def _places(recipe: Recipe, parts: Sequence[_Classes], source: str) -> tuple[list[str], list[list[int]]]:
    """Names of the classes, and the place among them of each of the parts' labels; the first part is for training."""
    _one_spelling(recipe, parts)
    values, names = _values_and_names(recipe, parts[0], source)
    # By name too: one table may number the classes that the other names, or number them in another order.
    place = {name: index for index, name in enumerate(names)} | {value: index for index, value in enumerate(values)}
    for part in parts[1:]:
        hub_names = part.names if recipe.data.label_names is None else None
        if hub_names is not None:
            part.values = [hub_names[value] if value in range(len(hub_names)) else value for value in part.values]
        # Numbers in one table may be texts in another: one label that isn't a number makes texts of all.
        part.values = [value if value in place else str(value) for value in part.values]
        unseen = sorted({value for value in part.values if value not in place})
        if unseen:
            raise DataError(
                f"data.label: the validation data have {some(unseen)} in column '{recipe.data.label}', which the "
                f"training data lack; known: {some(names)}"
            )
    return names, [[place[value] for value in part.values] for part in parts]


def _plain(label: str) -> str:
    """A label normalised in case and blanks; see `data.similar_labels`."""
    return " ".join(label.split()).casefold()


def _values_and_names(recipe: Recipe, train: _Classes, source: str) -> tuple[list[Any], list[str]]:
    """The classes by their values among the labels, and their names.

    Labels are indices 0, 1, ... into a hub data set's class names or data.label_names, or these names; else the classes
    are the values in the training data, in order.
    """
    column, values = recipe.data.label, train.values
    declared = recipe.data.label_names or train.names
    classes: list[Any] = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    names = [str(value) for value in declared or classes]
    if declared is not None:
        present = classes
        classes = list(declared) if all(isinstance(value, str) for value in present) else list(range(len(declared)))
        extra = [value for value in present if value not in classes]
        if extra:
            hint = " (a negative label marks rows without an answer)" if extra == [-1] else ""
            raise DataError(
                f"data.label: column '{column}' of {source} has {some(extra)}, but data.label_names names "
                f"{len(declared)} classes: {', '.join(declared)}{hint}"
            )
    if len(classes) > 100 and len(classes) > len(values) / 2:
        raise DataError(
            f"data.label: column '{column}' of {source} has {len(classes)} different values in {len(values)} rows, "
            "which are no classes; name another column, or set task: regression"
        )
    return classes, names


def rarest(rows: Sequence[Sequence[float]]) -> list[int | None]:
    """The rarest class of each row, so that a split can keep one row of each in training."""
    sets = [[place for place, has_class in enumerate(row) if has_class] for row in rows]
    counts = Counter(place for places in sets for place in places)
    return [min(places, key=lambda place: counts[place], default=None) for places in sets]


def some(values: Sequence[Any]) -> str:
    """The first of some values, in words."""
    shown = ", ".join(repr(value) if isinstance(value, str) else str(value) for value in values[:6])
    return shown + (f" and {len(values) - 6} more" if len(values) > 6 else "")
