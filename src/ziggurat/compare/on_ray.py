"""Runs on a Ray cluster: one task a run, taken up again on another worker when its own dies.

All machines must see the table's folder under the same path: there a run keeps its checkpoints, and from there
another worker goes on.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ziggurat.errors import RecipeError
from ziggurat.training.interrupt import Interrupted
from ziggurat.training.schema import Recipe

from .local import Outcome
from .table import Run
from .worker import log_of

#: How often a run whose worker died is taken up again.
RETRIES = 3


def run_on_ray(
    runs: Sequence[Run], folder: Path, workers: int | None = None, started: Callable[[Run], None] = lambda run: None
) -> Iterator[Outcome]:
    """Give `runs` to the cluster at RAY_ADDRESS (a local one is started without it) and yield each as it ends.

    A run asks for one GPU where the cluster has any, else for one processor. `workers`: at most so many at a time
    (default: as many as the cluster takes).

    Raises RecipeError if Ray isn't installed.
    """
    try:
        import ray
    except ImportError as error:
        raise RecipeError("engine: ray needs Ray; pip install 'ziggurat[ray]'") from error
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
                active[task.remote(recipe, str(log))] = (run, str(log))
                started(run)
            ended, _ = ray.wait(list(active), timeout=1.0)
            for reference in ended:
                run, log = active.pop(reference)
                yield _outcome(ray, reference, run, log)
    finally:
        for reference in active:
            ray.cancel(reference)


def _outcome(ray: Any, reference: Any, run: Run, log: str) -> Outcome:
    try:
        status, said = ray.get(reference)
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        return Outcome(run, "failed", error=f"{type(error).__name__}: {first}", log=log)
    if status == "done":
        return Outcome(run, "done", info=said, log=log)
    return Outcome(run, status, error=said, log=log)


def _take(recipe: Recipe, log: str) -> tuple[str, Any]:
    """What a Ray worker does; like `worker.serve`, but an answer instead of a pipe."""
    from .worker import take

    with open(log, "a", encoding="utf-8") as file:
        file.write(f"on worker {os.getpid()}\n")
        file.flush()
        try:
            return "done", take(recipe)
        except (Interrupted, KeyboardInterrupt) as error:
            return "stopped", str(error)
        except Exception as error:
            traceback.print_exc(file=file)
            first = (str(error).strip().splitlines() or [""])[0]
            return "failed", f"{type(error).__name__}: {first}"
