"""Scoring the adapters of an instruct task on lm-eval's tasks and on plain text, a column each."""

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError
from ziggurat.evaluation.ready import MAIN, Ready, ready
from ziggurat.evaluation.retention import read_text, retention
from ziggurat.files.staging import write_whole
from ziggurat.recipe.recipe import resolved
from ziggurat.recipe.schema import Part, Positive, Recipe, entry
from ziggurat.recipe.values import key_problems
from ziggurat.training.data.content import digest

#: The method that trains nothing: the base model as it is, a row to compare with.
NONE = "none"
#: The recipe's keys that matter for that row; the others, including the seed, don't change the model.
_OF_THE_BASE = ("model", "gguf_file", "revision", "dtype")
#: The file in a run's folder with the scores of each finished task.
FILE = "evaluation.json"

#: The column of the perplexity of plain text, with the adapter and without.
RETENTION = "retention"


class EvaluateKeys(Part):
    """The keys of a task's `evaluate`."""

    tasks: Any = entry(None, "tasks of lm-eval, or task -> metric")
    retention: str | None = entry(None, "file of plain text")
    limit: Positive | None = entry(None, "questions of each task or subject")
    data: str | None = entry(None, "folder of local parquet")
    run_generated_code: bool = entry(False, "whether code that the model writes may run")
    batch: Positive = entry(8, "texts at a time")


_FORM = "a mapping with tasks or retention, and limit, data, run_generated_code and batch where they are needed"


@dataclass(frozen=True)
class Evaluation:
    """Tasks with the metric that each reports, as `ziggurat eval` takes them, and `retention` with its own.

    `data` and `retention`, a file of plain text, are absolute paths or None.
    """

    metrics: dict[str, str]
    limit: int | None = None
    data: str | None = None
    run_generated_code: bool = False
    batch: int = 8
    retention: str | None = None

    @property
    def lm_tasks(self) -> list[str]:
        """The tasks that lm-eval scores."""
        return [task for task in self.metrics if task != RETENTION]

    @property
    def text_settings(self) -> dict[str, Any]:
        """The settings that change the score of plain text: the digest of the file."""
        exists = self.retention is not None and Path(self.retention).exists()
        return {"text": digest(Path(self.retention)) if exists else self.retention}  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change the score of a task; local data count by the content of the files."""
        exists = self.data is not None and Path(self.data).exists()
        return {"limit": self.limit, "data": digest(Path(self.data)) if exists else self.data}  # type: ignore[arg-type]


def read_evaluation(keys: dict[str, Any]) -> Evaluation:
    """The evaluation of a mapping in which `evaluation_problems` found nothing."""
    tasks, data, text = keys.get("tasks") or {}, keys.get("data"), keys.get(RETENTION)
    metrics = {str(task): metric or MAIN[task] for task, metric in _named(tasks).items()}
    return Evaluation(
        metrics=metrics | ({RETENTION: "perplexity"} if text is not None else {}),
        limit=keys.get("limit"),
        data=str(Path(data).expanduser().resolve()) if data is not None else None,
        run_generated_code=keys.get("run_generated_code", False),
        batch=keys.get("batch", 8),
        retention=str(Path(text).expanduser().resolve()) if text is not None else None,
    )


def _named(tasks: Any) -> dict[str, str | None]:
    return dict(tasks) if isinstance(tasks, dict) else dict.fromkeys(tasks)


def evaluation_problems(keys: Any) -> Iterator[str]:
    """Mistakes in a task's `evaluate`."""
    if not isinstance(keys, dict):
        yield f"{_FORM}, is needed, got {keys!r}"
        return
    yield from key_problems(EvaluateKeys.model_fields, keys)
    tasks = keys.get("tasks")
    if tasks is None and keys.get(RETENTION) is not None:
        pass  # plain text alone
    elif not tasks or not isinstance(tasks, list | dict) or not all(isinstance(task, str) for task in tasks):
        yield f"tasks: a list of {', '.join(MAIN)}, or a mapping task -> metric, is needed, got {tasks!r}"
    else:
        for task, metric in _named(tasks).items():
            if metric is None and task not in MAIN:
                yield f"tasks: {task}: say which of its metrics to show, {{{task}: acc}}"
            elif metric is not None and not (isinstance(metric, str) and metric):
                yield f"tasks: {task}: a metric's name is needed, got {metric!r}"
        if "humaneval" in tasks and keys.get("run_generated_code") is not True:
            yield (
                "tasks: humaneval runs code that the model writes; say run_generated_code: true if that is all right "
                "on these machines (docs/evaluation.md describes the limits)"
            )


def check_ready(evaluations: list[Evaluation]) -> None:
    """Check before hours of training that the scores can be computed.

    Raises MissingExtraError, RecipeError or DataError: lm-eval isn't installed, knows no such task, or the data can't
    be read.
    """
    checked: list[Evaluation] = []
    for evaluation in evaluations:
        if evaluation not in checked:
            checked.append(evaluation)
            if evaluation.retention is not None:
                read_text(Path(evaluation.retention))
            if not evaluation.lm_tasks:
                continue
            data = Path(evaluation.data) if evaluation.data is not None else None
            with ready(
                evaluation.lm_tasks, data=data, limit=evaluation.limit, run_code=evaluation.run_generated_code
            ) as tasks:
                for task in tasks:
                    _check_metric(task, evaluation.metrics[task.task])


def _check_metric(task: Ready, metric: str) -> None:
    names = task.score_names()
    if not names:
        raise DataError(f"evaluate: {task.task} has no score of its own; name {', '.join(task.parts)}")
    if metric not in names:
        raise DataError(f"evaluate: {task.task} has no metric '{metric}'; it has {', '.join(names)}")


def of_the_base(recipe: Recipe) -> dict[str, Any]:
    """The part of a resolved recipe that decides the base model's row."""
    base_keys = {key: value for key, value in resolved(recipe).items() if key in _OF_THE_BASE}
    return {"method.name": NONE, **base_keys}


def base_info() -> dict[str, Any]:
    """The values in the place of run.json if nothing was trained."""
    from ziggurat.training.loop.result import versions

    return {"metric": None, "after": {}, "parameters": {"adapter": 0}, "versions": versions()}


def evaluate_run(recipe: Recipe, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Task -> scores of all its metrics (which of them in per cent), rows and shots, of a run or of the base model.

    The scores of each task are saved in the run's folder at once, and aren't computed again under the same settings.

    Raises:
        DataError: the data can't be read, or the task has no such metric.
        MissingExtraError: lm-eval isn't installed.
        RecipeError: lm-eval knows no such task.
    """
    place = Path(recipe.folder).expanduser() / FILE
    scored = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    loaded: tuple[Any, Any] | None = None
    for task, metric in evaluation.metrics.items():
        settings = evaluation.text_settings if task == RETENTION else evaluation.settings
        if scored.get(task, {}).get("settings") != settings:
            loaded = loaded or _load(recipe)
            scored[task] = {**_scored(*loaded, task, evaluation), "settings": settings}
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(scored, indent=2) + "\n")
        if metric not in scored[task]["scores"]:
            raise DataError(f"evaluate: {task} has no metric '{metric}': {', '.join(scored[task]['scores'])}")
    return {
        task: {key: scored[task][key] for key in ("scores", "per_cent", "rows", "shots")} for task in evaluation.metrics
    }


def _scored(model: Any, tokenizer: Any, task: str, evaluation: Evaluation) -> dict[str, Any]:
    """One task's scores, as `TaskScore` holds them."""
    if task == RETENTION:
        assert evaluation.retention is not None
        scores, tokens = retention(model, tokenizer, read_text(Path(evaluation.retention)), evaluation.batch)
        return {"task": task, "scores": scores, "rows": tokens, "shots": None, "notes": [], "per_cent": ()}
    from ziggurat.evaluation.lm import evaluate

    several = evaluate(
        model,
        tokenizer,
        [task],
        data=Path(evaluation.data) if evaluation.data is not None else None,
        limit=evaluation.limit,
        batch=evaluation.batch,
        run_code=evaluation.run_generated_code,
    )
    if len(several) != 1:
        raise DataError(f"evaluate: {task} has no score of its own; name {', '.join(s.task for s in several)}")
    return asdict(several[0])


def _load(recipe: Recipe) -> tuple[Any, Any]:
    import torch

    # The trained model may not be collected yet; two models may not fit on a GPU.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if recipe.method["name"] != NONE:
        from ziggurat.training.answers.load import load_adapter_model

        trained = load_adapter_model(recipe.folder)
        return trained.model, trained.tokenizer
    from ziggurat.training.loop.trainers import quiet
    from ziggurat.training.model.base import HeadSpec, device, load_base

    where: dict[str, Any] = {"gguf_file": recipe.gguf_file, "revision": recipe.revision, "dtype": recipe.dtype}
    with quiet():
        base = load_base(recipe.model, HeadSpec("instruct", []), **where)
    return base.model.to(device()).eval(), base.tokenizer  # type: ignore[arg-type]
