"""One run in a separate process: it resumes a stopped run, and writes its output into a log."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

from ziggurat.errors import first_line
from ziggurat.host.plugins import load
from ziggurat.recipe.run_files import RUN
from ziggurat.recipe.schema import Recipe
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.folder.run_folder import RunFolder
from ziggurat.training.loop.run import train

from .evaluated import NONE, Evaluation, base_info, evaluate_run
from .surroundings import commit, surroundings

#: How a run ended, its info or the reason, and its surroundings.
Answer = tuple[str, Any, dict[str, Any]]


def take(recipe: Recipe, evaluation: Evaluation | None = None) -> dict[str, Any]:
    """Train by the recipe and compute the scores of `evaluation`, unless that has been done.

    Returns run.json, with those scores as `evaluated`. An interrupted run resumes from its checkpoint, or starts afresh
    if there is none.
    """
    info = base_info() if recipe.method["name"] == NONE else _trained(recipe)
    if evaluation is not None:
        info["evaluated"] = evaluate_run(recipe, evaluation)
        info["versions"]["lm_eval"] = version("lm_eval")
    return info


def _trained(recipe: Recipe) -> dict[str, Any]:
    folder = RunFolder(recipe)
    folder.settle()  # an earlier worker may have been killed with its result ready
    info = folder.final / RUN
    if not info.is_file():
        resume = folder.last_checkpoint() is not None
        train(recipe.model_copy(update={"resume": resume, "overwrite": not resume}))
    return json.loads(info.read_text(encoding="utf-8"))


def attempt(recipe: Recipe, evaluation: Evaluation | None, plugins: Sequence[str], errors: TextIO) -> Answer:
    """`take` as an answer: "done" with its result, or "stopped" or "failed" with the reason; and its surroundings.

    `plugins` are loaded first.
    """
    commit()  # cached: at the end of a long run the checkout may have changed
    try:
        load(plugins)
        return "done", take(recipe, evaluation), surroundings()
    except (Interrupted, KeyboardInterrupt) as error:
        return "stopped", str(error), surroundings()
    except BaseException as error:
        traceback.print_exc(file=errors)
        return "failed", f"{type(error).__name__}: {first_line(error)}", surroundings()


def serve(
    recipe: Recipe,
    evaluation: Evaluation | None,
    plugins: Sequence[str],
    log: str,
    gpu: str | None,
    threads: int,
    pipe: Connection,
) -> None:
    """The main function of a local process: sends its answer. Its output goes to the log."""
    if hasattr(signal, "pthread_sigmask"):  # the server of forks has it blocked: engines.py
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)
    _stop_with_parent()
    answer = attempt(recipe, evaluation, plugins, sys.stderr)
    pipe.send(answer)
    if answer[0] == "failed":
        raise SystemExit(1)


def serve_ray(recipe: Recipe, evaluation: Evaluation | None, plugins: Sequence[str], log: str) -> Answer:
    """The main function of a Ray worker: returns its answer. Ray keeps its output; errors go to the log."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"on worker {os.getpid()}\n")
        file.flush()
        return attempt(recipe, evaluation, plugins, file)


def _stop_with_parent() -> None:
    """Stop with a checkpoint when the parent program has ended, since nobody would read the result."""
    from multiprocessing import parent_process

    parent = parent_process()

    def watch() -> None:
        while parent is not None and parent.is_alive():
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def log_of(folder: Path, name: str) -> Path:
    """The file for a run's output."""
    path = folder / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
