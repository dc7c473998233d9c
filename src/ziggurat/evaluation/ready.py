"""Preparing tasks of lm-eval before a model is loaded: checks of names, consent to run code, and data."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError, RecipeError, first_line
from ziggurat.extras import require
from ziggurat.host.bars import quiet
from ziggurat.nearest import missing_path

from .local_tasks import SHOTS, write_humaneval, write_tasks

#: Task -> the metric in the papers' tables.
MAIN = {"mmlu": "acc", "bbh": "exact_match", "drop": "f1", "humaneval": "pass@1"}
#: Our short names -> lm-eval's, from the hub. For HumanEval `sandbox` judges the generated programs.
HUB_NAMES = {"mmlu": "mmlu", "bbh": "bbh_cot_fewshot", "drop": "drop"}
#: Hugging Face's variable for consent to the metric that runs code in these tasks.
_CONSENT = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True)
class Ready:
    """A task, group or tag: the requested `task`, its `name` in lm-eval, and lm-eval's objects.

    `runs`: the task, the group, or the tasks under the tag; `roots`: their names. `parts`: name -> task, groups opened.
    """

    task: str
    name: str
    manager: Any
    runs: list[Any]
    roots: list[str]
    parts: dict[str, Any]
    shots: int | None

    def score_names(self) -> list[str]:
        """The names of its scores: the metric, or `metric,filter` if the metric has several filters.

        Empty for a tag over several tasks, or a group without scores.
        """
        if self.task == "humaneval":
            return [MAIN["humaneval"]]
        if len(self.roots) > 1:
            return []
        (root,) = self.runs
        filters = list(dict.fromkeys(filter_.name for part in self.parts.values() for filter_ in part._filters))
        if any(root is part for part in self.parts.values()):
            named = [(metric, name) for metric in root.aggregation() for name in filters if metric != "bypass"]
        else:
            aggregated = root.aggregate_metric_list or []
            named = [(filter_.metric, name) for filter_ in aggregated for name in filter_.filter_list or filters]
        metrics = [metric for metric, _ in named]
        return [metric if metrics.count(metric) == 1 else f"{metric},{name}" for metric, name in named]


@contextmanager
def ready(
    tasks: list[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    run_code: bool = False,
    keep: Path | None = None,
) -> Iterator[list[Ready]]:
    """The tasks with their data loaded; arguments and errors as in `lm.evaluate`.

    Local task files exist within the block (in `keep`: afterwards too).
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"limit={limit}: at least 1 question a task")
    if "humaneval" in tasks and not run_code:
        raise RecipeError(
            "humaneval runs code that the model writes; say --run-generated-code if that is all right on this machine "
            "(docs/evaluation.md describes the limits)"
        )
    if "humaneval" in tasks and not hasattr(os, "killpg"):
        raise RecipeError("humaneval: this system lacks the limits under which generated code is run; use WSL 2")
    check_folder(data)
    require(f"scoring {', '.join(tasks)}", "lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = keep or Path(scratch)
        names = {task: HUB_NAMES.get(task, task) for task in tasks}
        if data is not None:
            names |= write_tasks([task for task in tasks if task in SHOTS], data, folder)
        elif "humaneval" in tasks:
            names["humaneval"] = write_humaneval(folder, {"dataset_path": "openai/openai_humaneval"})
        manager = _manager(list(names.values()), folder)
        unknown = [task for task in tasks if names[task] not in manager.all_tasks]
        if unknown:
            raise RecipeError(f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
        for task in tasks:
            _check_consent(manager, task, names[task], run_code)
        # A local task's file says its shots; the hub's BBH holds its three in its own prompt.
        shots = {task: SHOTS[task] for task in ("mmlu", "drop") if data is None}
        yield [_loaded(manager, task, names[task], shots.get(task)) for task in tasks]


def check_folder(data: Path | None) -> None:
    """Raise DataError if --data isn't a folder."""
    if data is not None and not data.expanduser().is_dir():
        raise DataError(f"--data: {f'{data} is not a folder' if data.expanduser().exists() else missing_path(data)}")


def _manager(names: list[str], folder: Path) -> Any:
    """lm-eval's index of task files; its own thousands are only read if `folder` lacks one of `names`."""
    from lm_eval.tasks import TaskManager

    if folder.is_dir():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    return TaskManager(include_path=str(folder))


def _check_consent(manager: Any, task: str, name: str, run_code: bool) -> None:
    """Check consent by the task's file, because its helpers may run code on loading."""
    if not runs_code(manager.task_index, name):
        return
    if not run_code:
        raise RecipeError(
            f"{task} runs code that the model writes, by lm-eval's own means and not within the limits that humaneval "
            f"has here; if that is all right on this machine, say --run-generated-code and set {_CONSENT}=1"
        )
    if os.environ.get(_CONSENT) != "1":
        raise RecipeError(
            f"{task} runs code that the model writes by lm-eval's own means, not within the limits that humaneval has "
            f"here: set {_CONSENT}=1 too if that is all right on this machine"
        )


def runs_code(index: Any, name: str) -> bool:
    """Whether lm-eval marks a task, or one in a group or under a tag, as running code that the model writes."""
    entry = index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    inside = {*entry.tags, *_children(config.get("task"))} if entry.kind.name in ("GROUP", "TAG") else ()
    return bool(config.get("unsafe_code")) or any(runs_code(index, name_inside) for name_inside in inside)


def _children(entries: Any) -> list[str]:
    """The names in a group's `task`, a list of names and of mappings that modify a task or define a group."""
    names: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, str):
            names.append(entry)
        elif isinstance(entry, dict):
            names += _children(entry.get("task"))
    return names


def _loaded(manager: Any, task: str, name: str, shots: int | None) -> Ready:
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise RecipeError(f"{task}: lm-eval needs more for it: {first_line(error)}") from error
    except (OSError, ValueError) as error:  # ConnectionError and the hub's errors; ValueError: nothing in the cache
        raise DataError(
            f"{task}: its data cannot be read: {first_line(error)}. Offline, give local files by --data"
        ) from error
    group = loaded.get("groups", {}).get(name)
    parts = loaded["tasks"]
    other = [part for part, part_task in parts.items() if getattr(part_task, "MULTIMODAL", False)]
    if other:
        raise RecipeError(f"{task} shows pictures or plays sounds ({other[0]}): only tasks of text can be scored")
    runs, roots = ([group], [name]) if group is not None else (list(parts.values()), list(parts))
    return Ready(task, name, manager, runs, roots, parts, shots)
