"""The labels of scored tasks: numbers, or classes by their names, in one order for all tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .faults import Faults, kind_of

if TYPE_CHECKING:
    from datasets import Dataset


def check_numbers(values: Iterable[Any], column: str, faults: Faults) -> None:
    """Note every value that is no finite number."""
    for index, value in enumerate(values):
        if value is None or value == "":
            faults.add(index, f"no number in column '{column}'", gap=True)
        elif number_of(value) is None:
            faults.add(index, f"{value!r} in column '{column}' is no number, which regression needs")


def number_of(value: Any) -> float | None:
    """A label as a finite number; None if it isn't one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_class_values(values: Iterable[Any], column: str, faults: Faults) -> None:
    """Note every value that can't name a class."""
    for index, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            faults.add(index, f"no label in column '{column}'", gap=True)
        elif isinstance(value, float) and not value.is_integer():
            faults.add(index, f"{value} in column '{column}' is no class; for numbers set task: regression")
        elif isinstance(value, list | dict | bytes):
            faults.add(index, f"column '{column}': one class is needed, this is {kind_of(value)}")


def class_values(values: Iterable[Any]) -> list[Any]:
    """Checked labels of one kind: whole numbers, or texts if one is a text. Rows without a label are skipped."""
    present = [int(value) if isinstance(value, float) else value for value in values if value not in (None, "")]
    kinds = {isinstance(value, str) for value in present}
    return [str(value) for value in present] if len(kinds) > 1 else present


def one_spelling(recipe: Recipe, parts: list[list[Any]]) -> None:
    """Merge labels that differ only by case or blanks, in place, if `data.similar_labels` is `merge`.

    They take the spelling of `data.label_names`, or the most frequent one. Raises DataError, which lists them all, if
    the recipe doesn't set `data.similar_labels`.
    """
    names = recipe.data.label_names or []
    counts = Counter(value for part in parts for value in part if isinstance(value, str))
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
    kept = {
        value: next((name for name in values if name in names), max(values, key=lambda value: counts[value]))
        for values in similar
        for value in values
    }
    for part in parts:
        part[:] = [kept.get(value, value) for value in part]


def classes_of(recipe: Recipe, tables: Sequence[Dataset], source: str) -> tuple[list[str], list[list[int]]]:
    """Names of the classes, and each table's labels as indices into them; the first table, `source`, is for training.

    Raises DataError for labels that the names or the training data lack, and for columns that hold no classes.
    """
    column = recipe.data.label
    values = [class_values(table[column]) for table in tables]
    one_spelling(recipe, values)
    known, names = _known(recipe, tables[0], values[0], source)
    # By name too: one table may number the classes that the other names, or number them in another order.
    place = {name: index for index, name in enumerate(names)} | {value: index for index, value in enumerate(known)}
    for table, part in zip(tables[1:], values[1:], strict=True):
        class_names = getattr(table.features[column], "names", None)
        if class_names is not None and recipe.data.label_names is None:
            part[:] = [class_names[value] if value in range(len(class_names)) else value for value in part]
        # Numbers here may be texts there: a single label that isn't a number makes texts of all.
        part[:] = [value if value in place else str(value) for value in part]
        unseen = sorted({value for value in part if value not in place})
        if unseen:
            raise DataError(
                f"data.label: the validation data have {some(unseen)} in column '{column}', which the training data "
                f"lack; known: {some(names)}"
            )
    return names, [[place[value] for value in part] for part in values]


def places_of(recipe: Recipe, labels: Sequence[Any], names: Sequence[str], source: str) -> list[int]:
    """Checked labels as places among the classes `names` of a trained model.

    Classes go by their names; whole numbers that name none, or that `data.label_names` gives names to, count them from
    0. Labels that differ by case or blanks alone are one class where the recipe has merged such. Raises DataError for
    classes that the model doesn't know.
    """
    values = class_values(labels)
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
    return [places[value] for value in values]


def _plain(label: str) -> str:
    """A label normalised in case and blanks; see `data.similar_labels`."""
    return " ".join(label.split()).casefold()


def names_of(recipe: Recipe, train: Dataset, source: str) -> list[str]:
    """The classes of the training data alone, as `classes_of` finds them."""
    values = class_values(train[recipe.data.label])
    one_spelling(recipe, [values])
    return _known(recipe, train, values, source)[1]


def _known(recipe: Recipe, train: Dataset, values: list[Any], source: str) -> tuple[list[Any], list[str]]:
    """The classes by their values among the labels, and their names.

    A hub data set's own class names and data.label_names count the classes 0, 1, ...; else the classes are the values
    found in the training data, in order.
    """
    column = recipe.data.label
    given = recipe.data.label_names or getattr(train.features[column], "names", None)
    seen = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if given is not None:
        texts = all(isinstance(value, str) for value in seen)
        known: list[Any] = list(given) if texts else list(range(len(given)))
        extra = [value for value in seen if value not in known]
        if extra:
            hint = " (a negative label marks rows without an answer)" if extra == [-1] else ""
            raise DataError(
                f"data.label: column '{column}' of {source} has {some(extra)}, but data.label_names names "
                f"{len(given)} classes: {', '.join(given)}{hint}"
            )
        names = [str(name) for name in given]
    else:
        known = seen
        names = [str(value) for value in seen]
    if len(known) > 100 and len(known) > len(values) / 2:
        raise DataError(
            f"data.label: column '{column}' of {source} has {len(known)} different values in {len(values)} rows, "
            "which are no classes; name another column, or set task: regression"
        )
    return known, names


def some(values: Sequence[Any]) -> str:
    """The first of some values, in words."""
    shown = ", ".join(repr(value) if isinstance(value, str) else str(value) for value in values[:6])
    return shown + (f" and {len(values) - 6} more" if len(values) > 6 else "")
