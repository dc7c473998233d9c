"""Language-model tasks by lm-eval, on a model in memory: by name from the hub, or from local parquet."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any
from unittest import mock

from ziggurat.errors import RecipeError

from .local_tasks import SHOTS
from .ready import MAIN, Ready, ready
from .sandbox import humaneval_program, run_program
from .units import is_share

#: Resamples for the standard errors that have no closed form; lm-eval's own default takes minutes for each.
_RESAMPLES = 1000


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task by metric, over `rows` questions.

    Those in `per_cent` are percentages; the others (perplexities, bits per byte, BLEU, ...) are as in lm-eval. A metric
    with several filters has one score for each, named as in lm-eval's results: `exact_match,strict-match`. `errors` are
    lm-eval's standard errors, if it has them, in the same units.
    """

    task: str
    scores: dict[str, float]
    rows: int
    shots: int | None
    notes: list[str] = field(default_factory=list)
    per_cent: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)


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
    """Score `model` on tasks: mmlu, bbh, drop, humaneval, or any name lm-eval knows (tasks of text, groups, tags).

    `data`: folder of local parquet (see `local_tasks`) for the four; else they come from the hub. `limit`: questions
    per task (a subject of MMLU is a task). `keep`: a folder to keep the task files of local data in, for stock lm-eval;
    your task files in it are found too. A tag, or a group without a score, gives the scores of its tasks.

    Raises:
        MissingExtraError: lm-eval isn't installed.
        RecipeError: a name is unknown, the model doesn't write text, or a task runs code that the model writes and
            `run_code`, which permits this, isn't set.
        DataError: the local files are invalid, or those of the hub can't be loaded.
        StorageError: the disk doesn't take the task files.
    """
    check_writes_text(model)
    with ready(tasks, data=data, limit=limit, run_code=run_code, keep=keep) as ready_tasks:
        return list(score(model, tokenizer, ready_tasks, limit=limit, batch=batch))


def score(
    model: Any, tokenizer: Any, tasks: list[Ready], *, limit: int | None = None, batch: int = 8
) -> Iterator[TaskScore]:
    """Score `model` on tasks prepared by `ready`; yields each task's scores when it is done.

    Raises:
        RecipeError: the model doesn't write text, or has fewer positions than a task's longest answer.
    """
    from lm_eval.models import huggingface

    check_writes_text(model)
    # lm-eval's decorators hide what its functions take.
    make: Any = huggingface.HFLM
    lm = make(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    for task in tasks:
        _check_room(lm, task)
    return (task_score for task in tasks for task_score in _scored(lm, task, limit))


def check_writes_text(model: Any) -> None:
    """Raises RecipeError for classifiers and encoders: these tasks need a model that writes text."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise RecipeError("tasks of lm-eval need a language model; this model gives no text, but classes or vectors")


def _check_room(lm: Any, task: Ready) -> None:
    """Raises RecipeError before the scoring; lm-eval would raise a bare assertion when it reaches the task."""
    from lm_eval.models import utils

    read: Any = utils.normalize_gen_kwargs
    configs = [part.config for part in task.parts.values() if part.config.output_type == "generate_until"]
    most = max((read(config.generation_kwargs or {}, lm.max_gen_toks)["max_gen_toks"] for config in configs), default=0)
    if lm.backend == "causal" and most >= lm.max_length:
        raise RecipeError(
            f"{task.task} lets a model write up to {most} tokens, and this one has {lm.max_length} positions for "
            "prompt and answer together: leave the task out"
        )


def _scored(lm: Any, task: Ready, limit: int | None) -> list[TaskScore]:
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate
    with _quiet():
        results: Any = simple_evaluate(
            model=lm,
            tasks=task.runs,
            task_manager=task.manager,
            num_fewshot=task.shots,
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=any("bypass" in part.aggregation() for part in task.parts.values()),
            confirm_run_unsafe_code=True,  # `ready` has asked
        )
    if task.task == "humaneval":
        return [_judged(results["samples"][task.name])]
    return [_score(results, task, name) for root in task.roots for name in _with_scores(results, root)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's bars and messages, and skip its unused queries of git and the system.

    Its standard errors are computed in this process: it would fork one with the model for each processor.
    """
    from lm_eval import evaluator

    with contextlib.ExitStack() as stack:
        for name in ("get_git_commit_hash", "add_env_info"):
            if hasattr(evaluator, name):
                stack.enter_context(mock.patch.object(evaluator, name, lambda *_: None))
        stack.enter_context(mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def _with_scores(results: Any, name: str) -> list[str]:
    """`name`, or for a group without scores its members with scores."""
    if any("," in key for key in _values(results, name)):
        return [name]
    return [part for child in results["group_subtasks"].get(name, []) for part in _with_scores(results, child)]


def _values(results: Any, name: str) -> dict[str, Any]:
    return results.get("groups", {}).get(name) or results["results"].get(name, {})


def _score(results: Any, task: Ready, name: str) -> TaskScore:
    values = {
        key: float(value)
        for key, value in _values(results, name).items()
        if "," in key and "_stderr," not in key and isinstance(value, Real) and not key.startswith("bypass,")
    }
    metrics = [key.partition(",")[0] for key in values]
    leaves = _leaves(results, name)
    scores, errors, shares = {}, {}, []
    for (key, value), metric in zip(values.items(), metrics, strict=True):
        shown = metric if metrics.count(metric) == 1 else key
        share = is_share(metric, value, [task.parts[leaf] for leaf in leaves])
        scores[shown] = 100.0 * value if share else value
        shares += [shown] if share else []
        error = _values(results, name).get(key.replace(",", "_stderr,", 1))
        if isinstance(error, Real):
            errors[shown] = (100.0 if share else 1.0) * float(error)
    rows = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
    label = task.task if name == task.name else name
    return TaskScore(label, scores, rows, SHOTS.get(label), per_cent=tuple(shares), errors=errors)


def _leaves(results: Any, name: str) -> list[str]:
    children = results["group_subtasks"].get(name, [])
    return list(dict.fromkeys(leaf for child in children for leaf in _leaves(results, child))) or [name]


def _judged(samples: list[dict[str, Any]]) -> TaskScore:
    passed, reasons = 0, []
    for sample in samples:
        doc = sample["doc"]
        verdict = run_program(humaneval_program(doc["prompt"], sample["resps"][0][0], doc["test"], doc["entry_point"]))
        passed += verdict.passed
        if not verdict.passed:
            reasons.append(f"{doc['task_id']}: {verdict.reason}")
    name = MAIN["humaneval"]
    return TaskScore("humaneval", {name: 100.0 * passed / len(samples)}, len(samples), 0, reasons, (name,))
