"""Language-model tasks by lm-eval, on a model in memory: by name from the hub, or from local parquet."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError, RecipeError

from .local_tasks import SHOTS, write_humaneval, write_tasks
from .sandbox import humaneval_program, run_program

#: Our short names -> lm-eval's, from the hub. HumanEval is generated only and judged by `sandbox`.
HUB_NAMES = {"mmlu": "mmlu", "bbh": "bbh_cot_fewshot", "drop": "drop"}
#: What the papers' tables report of each.
MAIN = {"mmlu": "acc", "bbh": "exact_match", "drop": "f1", "humaneval": "pass@1"}


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task, in per cent, by metric; `rows` questions; `standard_error` of the first metric if known."""

    task: str
    scores: dict[str, float]
    rows: int
    shots: int | None
    notes: list[str] = field(default_factory=list)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    run_code: bool = False,
    keep: Path | None = None,
) -> list[TaskScore]:
    """Score `model` on tasks: mmlu, bbh, drop, humaneval, or any name lm-eval knows.

    `data`: folder of local parquet (see `local_tasks`) for the four; else they come from the hub. `limit`: questions a
    task (a subject of MMLU is a task). `keep`: where the task files of local data are left, for stock lm-eval.

    Raises:
        RecipeError: lm-eval isn't installed, a name is unknown, or humaneval is asked for without `run_code`, which
            says that code written by the model may be executed.
        DataError: the local files aren't as they should be.
        StorageError: the disk doesn't take the task files.
    """
    if "humaneval" in tasks and not run_code:
        raise RecipeError(
            "humaneval runs code that the model writes; say --run-generated-code if that is all right on this machine "
            "(docs/evaluation.md says what the limits are)"
        )
    try:
        from lm_eval.models import huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError("these tasks need lm-eval; pip install 'ziggurat[evaluate]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        local = [task for task in tasks if task in SHOTS and (data is not None or task == "humaneval")]
        names = {task: HUB_NAMES.get(task, task) for task in tasks}
        if data is not None:
            names |= write_tasks(local, data, folder)
        elif "humaneval" in tasks:
            names["humaneval"] = write_humaneval(folder, {"dataset_path": "openai/openai_humaneval"})
        manager = TaskManager(include_path=str(folder), include_defaults=len(local) < len(tasks))
        unknown = [task for task in tasks if names[task] not in manager.all_tasks]
        if unknown:
            raise RecipeError(f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
        # lm-eval's decorators hide what its functions take.
        make: Any = huggingface.HFLM
        lm = make(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        return [_score(lm, manager, task, names[task], data is not None, limit) for task in tasks]


def _score(lm: Any, manager: Any, task: str, name: str, is_local: bool, limit: int | None) -> TaskScore:
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate
    # A local task's file says its shots; the hub's BBH holds its three in its own prompt.
    shots = SHOTS[task] if task in ("mmlu", "drop") and not is_local else None
    try:
        found: Any = simple_evaluate(
            model=lm,
            tasks=[name],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=task == "humaneval",
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{task}: its data cannot be read: {first}. Offline, give local files by --data") from error
    rows = sum(part["effective"] for part in found["n-samples"].values())
    if task == "humaneval":
        return _judged(found["samples"][name], rows)
    values = found.get("groups", {}).get(name) or found["results"][name]
    scores = {
        key.partition(",")[0]: 100.0 * float(value)
        for key, value in values.items()
        if "," in key and "stderr" not in key and isinstance(value, (int, float))
    }
    return TaskScore(task, scores, rows, SHOTS.get(task))


def _judged(samples: list[dict[str, Any]], rows: int) -> TaskScore:
    passed, reasons = 0, []
    for sample in samples:
        doc = sample["doc"]
        verdict = run_program(humaneval_program(doc["prompt"], sample["resps"][0][0], doc["test"], doc["entry_point"]))
        passed += verdict.passed
        if not verdict.passed:
            reasons.append(f"{doc['task_id']}: {verdict.reason}")
    return TaskScore("humaneval", {MAIN["humaneval"]: 100.0 * passed / len(samples)}, rows, 0, reasons)
