"""Runs on a Ray cluster: one task a run, taken up again on another worker when its own dies.

All machines must see the table's folder under the same path: there a run keeps its checkpoints, and from there
another worker goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ziggurat.errors import first_line
from ziggurat.extras import require
from ziggurat.host.plugins import loaded
from ziggurat.recipe.schema import Recipe

from .evaluated import Evaluation
from .local import PATIENCE, Outcome
from .table import Run
from .worker import Answer, log_of

#: How often a run whose worker died is taken up again.
RETRIES = 3


def run_on_ray(
    runs: Sequence[Run], folder: Path, workers: int | None = None, started: Callable[[Run], None] = lambda run: None
) -> Iterator[Outcome]:
    """Give `runs` to the cluster at RAY_ADDRESS (a local one is started without it) and yield each as it ends.

    A run asks for one GPU where the cluster has any, else for one processor. `workers`: at most so many at a time
    (default: as many as the cluster takes). When the loop over this is left early, or Ctrl-C comes, the running ones
    stop with a checkpoint, and this waits for it.

    Raises MissingExtraError if Ray isn't installed.
    """
    require("engine: ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    task = ray.remote(_take).options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
    waiting, active = list(runs), {}
    try:
        while waiting or active:
            while waiting and (workers is None or len(active) < workers):
                run = waiting.pop(0)
                log = log_of(folder.resolve(), Path(run.recipe.folder).name)
                place = str(Path(run.recipe.folder).expanduser().resolve())
                recipe = run.recipe.model_copy(update={"output": place})
                active[task.remote(recipe, run.evaluation, loaded(), str(log))] = (run, str(log))
                started(run)
            ended, _ = ray.wait(list(active), timeout=1.0)
            for reference in ended:
                run, log = active.pop(reference)
                yield _outcome(ray, reference, run, log)
    finally:
        for reference in active:
            ray.cancel(reference)
        if active:
            # A cancelled run stops at its next step and writes a checkpoint; with this program its worker would go.
            ray.wait(list(active), num_returns=len(active), timeout=PATIENCE)


def _outcome(ray: Any, reference: Any, run: Run, log: str) -> Outcome:
    try:
        status, said, where = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(run, "failed", error=f"{type(error).__name__}: {first_line(error)}", log=log)
    if status == "done":
        return Outcome(run, "done", info=said, log=log, where=where)
    return Outcome(run, status, error=said, log=log, where=where)


def _take(recipe: Recipe, evaluation: Evaluation | None, plugins: Sequence[str], log: str) -> Answer:
    """What a Ray worker does; like `worker.serve`, but an answer instead of a pipe."""
    from .worker import attempt

    with open(log, "a", encoding="utf-8") as file:
        file.write(f"on worker {os.getpid()}\n")
        file.flush()
        return attempt(recipe, evaluation, plugins, file)
