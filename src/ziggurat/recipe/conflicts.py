"""Mistakes of a recipe that only two keys together show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ziggurat.nearest import did_you_mean

from .glue import brings_validation
from .schema import keys
from .tasks import REWARDED, TASKS


def _of(*rows: str) -> tuple[str, ...]:
    """The tasks whose data have one of these forms."""
    return tuple(name for name, task in TASKS.items() if task.rows in rows)


_CLASSES = ("classification", "multilabel")
#: Keys, or sections, that go with some tasks alone.
_GOES_WITH = {
    ("data.format", "data.loss", "data.packing", "data.streaming", "data.image_folder", "tower"): _of("answers"),
    ("data.prefix", "data.max_target"): _of("sources"),
    ("train.answers",): _of("answers", "sources"),
    ("data.as_chat",): _of("answers", "pairs", "judged", "prompts"),
    ("train.beta",): _of("pairs", "judged"),
    ("rewards.", "sampling."): REWARDED,
    ("data.label",): _of("labelled", "judged"),
    ("data.text", "data.text_pair", "head.pooling", "head.dropout"): _of("labelled"),
    ("head.lr",): tuple(name for name, task in TASKS.items() if not task.writes),
    ("data.label_names",): (*_CLASSES, "tokens"),
    ("data.similar_labels",): _CLASSES,
    ("data.label_separator",): ("multilabel",),
}


def _tasks_of(key: str) -> tuple[str, ...]:
    """The tasks that a key goes with."""
    sought = (key, key[: key.find(".") + 1])
    return next((tasks for keys, tasks in _GOES_WITH.items() if any(name in keys for name in sought)), tuple(TASKS))


def conflicts(good: dict[str, Any]) -> list[str]:
    """What is wrong with keys that are good by themselves; those that aren't take no part."""
    found: list[str] = []
    known = keys()

    def value(key: str) -> Any:
        return good.get(key, known[key].get_default(call_default_factory=True))

    task = value("task")
    for key in good:
        if task not in _tasks_of(key) and good[key] != known[key].get_default(call_default_factory=True):
            found.append(f"{key}: has no meaning with task: {task}")
    metrics = TASKS[task].metrics
    if value("metric") is not None and value("metric") not in metrics:
        found.append(f"metric: {value('metric')} does not go with task: {task}; one of {', '.join(metrics)}")
    files = 1 + len(value("data.more") or [])
    if value("data.weights") is not None and len(value("data.weights")) != files:
        found.append(
            f"data.weights: {len(value('data.weights'))} for {files} files; data.train names the files as a list"
        )
    if files > 1 and brings_validation(value("data.train"), value("data.folder")):
        found.append(f"data.more: has no meaning with {value('data.train')}, a task of GLUE")
    share, dropout, warmup = (known[key].default for key in ("data.validation_share", "head.dropout", "train.warmup"))
    if good.get("data.validation_share", share) != share and "data.validation_rows" in good:
        found.append("data.validation_rows: given beside data.validation_share; keep one")
    if value("data.validation") is not None or value("data.validation_split") is not None:
        for key in ("data.validation_share", "data.validation_rows"):
            if key in good and good[key] != known[key].get_default(call_default_factory=True):
                found.append(f"{key}: has no meaning where validation data are named")
    elif good.get("data.validation_share", share) != share and brings_validation(
        value("data.train"), value("data.folder")
    ):
        found.append(
            f"data.validation_share: has no meaning with {value('data.train')}, which has validation data; "
            "data.validation_rows splits a part of the training rows off instead"
        )
    names = value("data.label_names") or []
    if len(set(names)) < len(names):
        found.append(f"data.label_names: two classes have one name: {', '.join(names)}")
    if value("head.pooling") == "model" and good.get("head.dropout", dropout) != dropout:
        found.append("head.dropout: has no meaning with head.pooling: model, whose dropout is the model's own")
    if value("train.scheduler") == "constant" and good.get("train.warmup", warmup) not in (warmup, 0):
        found.append("train.warmup: has no meaning with train.scheduler: constant; constant_with_warmup has one")
    if value("train.best"):
        if value("train.evaluate") == "never":
            found.append("train.best: needs scores to choose by; set train.evaluate to epoch or a number of steps")
        elif value("train.evaluate") != value("train.save"):
            found.append("train.save: must equal train.evaluate when train.best is true")
    if task in REWARDED and value("train.group_by_length"):
        found.append(
            f"train.group_by_length: has no meaning with task: {task}, whose batches are groups of completions"
        )
    if value("sampling.vllm") is None and value("sampling.vllm_options"):
        found.append("sampling.vllm_options: has no meaning without sampling.vllm")
    found += _of_streams(good, value)
    found += tracker_problems(value("train.report_to") or [])
    if value("resume") and value("overwrite"):
        found.append("overwrite: contradicts resume; give one of them")
    name = value("name")
    if not name.strip() or any(sign in name for sign in "/\\"):
        found.append(f"name: '{name}' cannot name a folder; use output for a path")
    return found


def _of_streams(good: dict[str, Any], value: Callable[[str], Any]) -> list[str]:
    """What is wrong with `data.streaming`, or with keys beside it."""
    if not value("data.streaming"):
        buffer = value("data.shuffle_buffer") != keys()["data.shuffle_buffer"].default
        return ["data.shuffle_buffer: has no meaning without data.streaming"] * buffer
    found = [
        f"{key}: has no meaning with data.streaming, whose rows are not counted beforehand"
        for key in ("data.validation_share", "data.max_train", "train.epochs", "train.group_by_length")
        if key in good and good[key] != keys()[key].default
    ]
    if value("train.max_steps") is None:
        found.append("data.streaming: needs train.max_steps, for a stream has no end that is known")
    return found


def unmerged_with_vllm(good: dict[str, Any], choice: dict[str, Any]) -> list[str]:
    """What is wrong with `sampling.vllm` beside a checked `method.*`: TRL sends merged weights to vLLM."""
    from .methods import METHODS, shown

    method = METHODS[choice["name"]]
    if good.get("sampling.vllm") is None or method.merges or method.four_bits or method.config is None:
        return []
    able = ", ".join(name for name, row in METHODS.items() if row.merges)
    return [
        f"sampling.vllm: TRL merges the adapter into the weights that it sends to vLLM, and {shown(choice['name'])} "
        f"can't be merged; leave the key out, or take one of {able}"
    ]


def known_trackers() -> list[str]:
    """The names that transformers' Trainer can report to."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return list(INTEGRATION_TO_CALLBACK)


def tracker_problems(names: Sequence[str]) -> list[str]:
    """What is wrong with a recipe's `train.report_to`, whatever is installed."""
    allowed = known_trackers() if names else []
    found = [
        f"train.report_to: '{name}' is no tracker of transformers{did_you_mean(name, allowed)}; "
        f"one of {', '.join(allowed)}, or leave the key out to report nowhere"
        for name in names
        if name not in allowed
    ]
    twice = sorted({name for name in names if list(names).count(name) > 1})
    return found + [f"train.report_to: {name} is named twice" for name in twice]
