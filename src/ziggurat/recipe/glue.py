"""GLUE's eight tasks: columns, classes, splits and metrics.

Names, columns and splits are those of the hub data set `nyu-mll/glue` (Wang et al., ICLR 2019).
"""

from dataclasses import dataclass
from typing import Any

from ziggurat.nearest import did_you_mean

HUB = "nyu-mll/glue"
PREFIX = "glue/"


@dataclass(frozen=True)
class GlueTask:
    """One task. `classes` are named as on the hub, in the order of the labels 0, 1, ...; none: a number from 0 to 5.

    `server` maps a test split to the file that GLUE's server expects; `says_names`: the file has the classes' names
    instead of their numbers. `second` is the second metric of tasks that GLUE reports by two.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str
    server: dict[str, str]
    says_names: bool = False
    validation: str = "validation"
    second: str | None = None


_SENTENCES, _QUESTIONS = ("sentence1", "sentence2"), ("question1", "question2")
_ENTAILED = ("entailment", "not_entailment")
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews", {"test": "CoLA.tsv"}),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), "accuracy", {"test": "SST-2.tsv"}),
    "mrpc": GlueTask(_SENTENCES, ("not_equivalent", "equivalent"), "accuracy", {"test": "MRPC.tsv"}, second="f1"),
    "stsb": GlueTask(_SENTENCES, (), "pearson", {"test": "STS-B.tsv"}, second="spearman"),
    "qqp": GlueTask(_QUESTIONS, ("not_duplicate", "duplicate"), "accuracy", {"test": "QQP.tsv"}, second="f1"),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        says_names=True,
        validation="validation_matched",
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILED, "accuracy", {"test": "QNLI.tsv"}, says_names=True),
    "rte": GlueTask(_SENTENCES, _ENTAILED, "accuracy", {"test": "RTE.tsv"}, says_names=True),
}


def glue_name(train: Any, subset: Any = None) -> str | None:
    """The GLUE task that `data.train` (with `data.subset`) names, as `glue/mrpc` or as the hub does; else None."""
    if not isinstance(train, str):
        return None
    if train.startswith(PREFIX) and "." not in train:
        return train.removeprefix(PREFIX)
    return subset if train == HUB and subset in GLUE else None


def fill_in(flat: dict[str, Any]) -> list[str]:
    """Complete a flat recipe by the values of its GLUE task (columns, classes, task, metric).

    Returns mistakes: an unknown task, a subset beside it, a folder for other data.
    """
    train, subset = flat.get("data.train"), flat.get("data.subset")
    name = glue_name(train, subset)
    if name is None:
        if flat.get("data.folder") is not None:
            return ["data.folder: is for GLUE's tasks; set data.train to glue/<task>, or name the file itself there"]
        return []
    if name not in GLUE:
        return [f"data.train: 'glue/{name}' is not one of glue/{', glue/'.join(GLUE)}{did_you_mean(name, GLUE)}"]
    if train != HUB and subset is not None:
        return [f"data.subset: has no meaning with data.train: {train}, which names the task itself"]
    task = GLUE[name]
    values = {"task": "classification" if task.classes else "regression", "metric": task.metric}
    values["data.text"] = task.columns[0]
    if len(task.columns) > 1:
        values["data.text_pair"] = task.columns[1]
    for key, value in values.items():
        flat.setdefault(key, value)
    if task.classes and flat["task"] == "classification":
        flat.setdefault("data.label_names", list(task.classes))
    return []


def brings_validation(train: Any, folder: Any) -> bool:
    """Whether the data include validation data without naming them, as GLUE does."""
    return isinstance(train, str) and (train.startswith(PREFIX) or folder is not None)
