"""One run in a process of its own: taken up where an earlier one was stopped, its output in a log."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ziggurat.training.folders import RUN, RunFolder
from ziggurat.training.interrupt import Interrupted
from ziggurat.training.run import train
from ziggurat.training.schema import Recipe


def take(recipe: Recipe) -> dict[str, Any]:
    """Train as the recipe says unless that has been done, and return its run.json.

    A checkpoint that an interrupted run left is gone on from; what left none is started afresh.
    """
    folder = RunFolder(recipe)
    folder.settle()  # an earlier worker may have been killed with its result ready
    info = folder.final / RUN
    if not info.is_file():
        resume = folder.last_checkpoint() is not None
        train(recipe.model_copy(update={"resume": resume, "overwrite": not resume}))
    return json.loads(info.read_text(encoding="utf-8"))


def serve(recipe: Recipe, log: str, gpu: str | None, threads: int, answer: Connection) -> None:
    """What a worker process does: send ("done", run.json) or (how it ended, why). What it prints goes to the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)
    _stop_with_parent()
    try:
        answer.send(("done", take(recipe)))
    except (Interrupted, KeyboardInterrupt) as error:
        answer.send(("stopped", str(error)))
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        first = (str(error).strip().splitlines() or [""])[0]
        answer.send(("failed", f"{type(error).__name__}: {first}"))
        raise SystemExit(1) from None


def _stop_with_parent() -> None:
    """Stop with a checkpoint when the program that asked for this run is gone: nobody would take the result."""
    from multiprocessing import parent_process

    parent = parent_process()

    def watch() -> None:
        while parent is not None and parent.is_alive():
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def log_of(folder: Path, name: str) -> Path:
    """Where a run's output goes."""
    path = folder / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
