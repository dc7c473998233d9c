"""A trained adapter on GLUE: scores on a labelled split, and the files that GLUE's server takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ziggurat.errors import DataError
from ziggurat.host.staging import write_whole
from ziggurat.training.answer import Prediction, predict
from ziggurat.training.glue import GLUE, GlueTask, glue_name, read_glue
from ziggurat.training.load import Loaded
from ziggurat.training.metrics import score
from ziggurat.training.model import HeadSpec
from ziggurat.training.schema import Recipe


def task_of(loaded: Loaded, wanted: str | None = None) -> str:
    """The GLUE task an adapter was trained on. Raises DataError if there is none, or it isn't the `wanted` one."""
    return task_for(loaded.recipe, loaded.head, wanted)


def task_for(recipe: Recipe, head: HeadSpec, wanted: str | None = None) -> str:
    """`task_of`, before a model is loaded."""
    data = recipe.data
    name = glue_name(data.train, data.subset)
    if wanted is not None and wanted not in GLUE:
        raise DataError(f"'glue/{wanted}' is not one of glue/{', glue/'.join(GLUE)}")
    if name is None and wanted is None:
        raise DataError(f"this adapter was trained on '{data.train}', which is no task of GLUE: name one, as glue/rte")
    found = wanted or str(name)
    classes = GLUE[found].classes
    if len(classes) != len(head.label_names) or (len(GLUE[found].columns) > 1) != head.pair:
        raise DataError(
            f"glue/{found} has {len(classes) or 'no'} classes and {len(GLUE[found].columns)} texts a row; this adapter "
            f"({data.train}) answers with {len(head.label_names) or 'no'} classes to {1 + head.pair}"
        )
    return found


def check_data(name: str, folder: str | None, *, server: bool) -> None:
    """See that the splits to be answered are there: for the scores, or for GLUE's server. Raises DataError."""
    for split in GLUE[name].server if server else [GLUE[name].validation]:
        read_glue(name, split, folder)


def glue_scores(loaded: Loaded, name: str, folder: str | None = None, limit: int | None = None) -> dict[str, float]:
    """Scores on the validation split, in per cent, and `rows`. MNLI's mismatched split comes too, as `mismatched_*`."""
    task = GLUE[name]
    found: dict[str, float] = {}
    splits = {"": task.validation} | ({"mismatched_": "validation_mismatched"} if name == "mnli" else {})
    for prefix, split in splits.items():
        table = read_glue(name, split, folder)
        table = table.select(range(min(limit, len(table)))) if limit else table
        labels = np.asarray(table["label"])
        if task.classes and labels.min() < 0:
            raise DataError(f"glue/{name}: the labels of split '{split}' are hidden, so there is nothing to score by")
        answers = _answers(loaded, task, table)
        said = np.asarray([_number(answer, loaded) for answer in answers])
        scores = score(loaded.recipe, said, labels, len(task.classes))
        found.update({f"{prefix}{key}": value for key, value in scores.items()})
        found[f"{prefix}rows"] = float(len(table))
    return found


def write_server_files(loaded: Loaded, name: str, out: Path, folder: str | None = None) -> list[Path]:
    """Predictions of the test splits in the form of GLUE's server, `index<tab>prediction`; the files' paths.

    Classes are counted or named as the server wants them; STS-B's numbers are kept within 0 to 5.
    Raises DataError if a test split isn't there; then nothing is written.
    """
    task = GLUE[name]
    texts: dict[str, str] = {}
    for split, file in task.server.items():
        table = read_glue(name, split, folder)
        lines = ["index\tprediction"]
        for index, answer in zip(_indices(table), _answers(loaded, task, table), strict=True):
            lines.append(f"{index}\t{_as_server(answer, loaded, task)}")
        texts[file] = "\n".join(lines) + "\n"
    for file, text in texts.items():
        write_whole(out / file, text)
    return [out / file for file in texts]


def _answers(loaded: Loaded, task: GlueTask, table: object) -> list[Prediction]:
    columns = [["" if text is None else str(text) for text in table[column]] for column in task.columns]  # type: ignore[index]
    return predict(loaded, columns[0], columns[1] if len(columns) > 1 else None)


def _indices(table: object) -> list[int]:
    return [int(index) for index in table["idx"]]  # type: ignore[index]


def _number(answer: Prediction, loaded: Loaded) -> float:
    value = answer.answer
    return float(loaded.head.label_names.index(value)) if isinstance(value, str) else value


def _as_server(answer: Prediction, loaded: Loaded, task: GlueTask) -> str:
    value = answer.answer
    if not isinstance(value, str):
        return f"{min(max(value, 0.0), 5.0):.3f}"
    place = loaded.head.label_names.index(value)
    return task.classes[place] if task.says_names else str(place)
