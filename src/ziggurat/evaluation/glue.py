"""A trained adapter on GLUE: scores on a labelled split, and the files for GLUE's server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.errors import DataError
from ziggurat.extras import require
from ziggurat.files.staging import write_whole
from ziggurat.recipe.glue import GLUE, GlueTask, glue_name
from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.tasks import TASKS
from ziggurat.training.answers.load import Loaded
from ziggurat.training.answers.predict import Prediction, predict
from ziggurat.training.data.glue import read_glue
from ziggurat.training.data.tables import require_column
from ziggurat.training.loop.metrics import score
from ziggurat.training.model.base import HeadSpec

if TYPE_CHECKING:
    from datasets import Dataset


def task_of(loaded: Loaded, expected: str | None = None) -> str:
    """The GLUE task an adapter was trained on. Raises DataError if there is none, or it isn't `expected`."""
    return task_for(loaded.recipe, loaded.head, expected)


def task_for(recipe: Recipe, head: HeadSpec, expected: str | None = None) -> str:
    """`task_of`, before a model is loaded."""
    data = recipe.data
    name = glue_name(data.train, data.subset)
    if expected is not None and expected not in GLUE:
        raise DataError(f"'glue/{expected}' is not one of glue/{', glue/'.join(GLUE)}")
    if name is None and expected is None:
        raise DataError(f"this adapter was trained on '{data.train}', which is no task of GLUE: name one, as glue/rte")
    task = expected or str(name)
    classes = GLUE[task].classes
    if len(classes) != len(head.label_names) or (len(GLUE[task].columns) > 1) != head.pair:
        raise DataError(
            f"glue/{task} has {len(classes) or 'no'} classes and {len(GLUE[task].columns)} texts a row; the data that "
            f"this adapter was trained on ('{data.train}') have {len(head.label_names) or 'no'} classes and "
            f"{1 + head.pair} a row"
        )
    class_order(recipe, head, task)
    return task


def class_order(recipe: Recipe, head: HeadSpec, name: str) -> list[int]:
    """The index of each class of the head among the classes of the GLUE task `name`.

    A head that was trained on the task itself has the task's order of classes. For other data the labels' names
    identify the classes, or the numbers in them (`1`, `LABEL_1`). Raises DataError if neither does.
    """
    classes, names = GLUE[name].classes, [str(label) for label in head.label_names]
    if glue_name(recipe.data.train, recipe.data.subset) == name:
        return list(range(len(classes)))
    plain = [label.casefold() for label in names]
    if sorted(plain) == sorted(classes):
        return [classes.index(label) for label in plain]
    places = [int(match[1]) for label in names if (match := re.fullmatch(r"(?:LABEL_)?([0-9]+)", label))]
    if sorted(places) == list(range(len(classes))):
        return places
    raise DataError(
        f"glue/{name} has the classes {', '.join(classes)}; this adapter, trained on "
        f"'{recipe.data.train}', knows {', '.join(names)}, and they can't be matched. Train it on data "
        f"that name their classes so, or count them {', '.join(map(str, range(len(classes))))} in this order"
    )


def needs(name: str) -> tuple[str, ...]:
    """The packages outside the core that scoring the GLUE task `name` imports."""
    return "datasets", TASKS["classification" if GLUE[name].classes else "regression"].package


def check_data(name: str, folder: str | None, *, server: bool) -> None:
    """Check that the splits and their columns exist: for the scores, or for GLUE's server.

    Raises DataError.
    """
    for split in GLUE[name].server if server else _scored_splits(name).values():
        _read(name, split, folder, "idx" if server else "label")


def _scored_splits(name: str) -> dict[str, str]:
    """Prefix of the names of a split's scores -> the split."""
    return {"": GLUE[name].validation} | ({"mismatched_": "validation_mismatched"} if name == "mnli" else {})


def _read(name: str, split: str, folder: str | None, beside: str) -> Dataset:
    """A split with the task's texts and one column more."""
    table = read_glue(name, split, folder)
    for column in (*GLUE[name].columns, beside):
        require_column(table, column, f"glue/{name}", f"split '{split}'")
    return table


def glue_scores(loaded: Loaded, name: str, folder: str | None = None, limit: int | None = None) -> dict[str, float]:
    """Scores on the validation split, in per cent, and `rows`. MNLI's mismatched split comes too, as `mismatched_*`.

    Raises MissingExtraError without the packages that `needs` names.
    """
    require(f"scoring glue/{name}", *needs(name))
    task, order = GLUE[name], _order(loaded, name)
    all_scores: dict[str, float] = {}
    for prefix, split in _scored_splits(name).items():
        table = _read(name, split, folder, "label")
        table = table.select(range(min(limit, len(table)))) if limit else table
        labels = np.asarray(labels_of(table, name, split))
        predictions = np.asarray([_number(answer, order) for answer in _answers(loaded, task, table)])
        scores = score(loaded.recipe, predictions, labels, len(task.classes))
        all_scores.update({f"{prefix}{key}": value for key, value in scores.items()})
        all_scores[f"{prefix}rows"] = float(len(table))
    return all_scores


def write_server_files(loaded: Loaded, name: str, out: Path, folder: str | None = None) -> list[Path]:
    """Predictions of the test splits in the form of GLUE's server, `index<tab>prediction`; the files' paths.

    Classes are written as numbers or names, as the server expects; STS-B's numbers are clipped to 0 to 5. Raises
    DataError if a test split isn't there; then nothing is written.
    """
    task, order = GLUE[name], _order(loaded, name)
    texts: dict[str, str] = {}
    for split, file in task.server.items():
        table = _read(name, split, folder, "idx")
        lines = ["index\tprediction"]
        for index, answer in zip(table["idx"], _answers(loaded, task, table), strict=True):
            lines.append(f"{int(index)}\t{_as_server(answer, order, task)}")
        texts[file] = "\n".join(lines) + "\n"
    for file, text in texts.items():
        write_whole(out / file, text)
    return [out / file for file in texts]


def _answers(loaded: Loaded, task: GlueTask, table: object) -> list[Prediction]:
    columns = [["" if text is None else str(text) for text in table[column]] for column in task.columns]  # type: ignore[index]
    return predict(loaded, columns[0], columns[1] if len(columns) > 1 else None)


def labels_of(table: object, name: str, split: str) -> list[float]:
    """Classes as indices, or numbers from 0 to 5. Raises DataError if the labels are hidden."""
    classes = GLUE[name].classes
    labels: list[float] = []
    for row, label in enumerate(table["label"], start=1):  # type: ignore[index]
        if isinstance(label, str) and label not in classes:
            raise DataError(
                f"glue/{name}: row {row} of split '{split}' has the label '{label}', none of "
                f"{', '.join(classes) or 'its numbers'}"
            )
        if label is None or (not isinstance(label, str) and label < 0):
            raise DataError(f"glue/{name}: the labels of split '{split}' are hidden, so there is nothing to score by")
        labels.append(classes.index(label) if isinstance(label, str) else label)
    return labels


def _order(loaded: Loaded, name: str) -> dict[str, int]:
    """The head's answers -> indices among the task's classes."""
    return dict(zip(loaded.head.label_names, class_order(loaded.recipe, loaded.head, name), strict=True))


def _number(answer: Prediction, order: dict[str, int]) -> float:
    value: Any = answer.answer
    return float(order[value]) if isinstance(value, str) else value


def _as_server(answer: Prediction, order: dict[str, int], task: GlueTask) -> str:
    value = answer.answer
    if not isinstance(value, str):
        return f"{min(max(value, 0.0), 5.0):.3f}"
    place = order[value]
    return task.classes[place] if task.says_names else str(place)
