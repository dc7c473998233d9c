"""Runs in processes on this machine, several at a time, one a GPU where there are GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ziggurat.host.plugins import loaded

from .surroundings import surroundings
from .table import Run
from .worker import log_of, serve

#: Seconds that stopped runs have to write their checkpoints.
PATIENCE = 120


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done` with its run.json, `failed` or `stopped` with the reason, and where its output lies.

    `where` are the surroundings of the worker, as far as it could still say.
    """

    run: Run
    status: str
    info: dict[str, Any] | None = None
    error: str = ""
    log: str | None = None
    where: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Active:
    run: Run
    process: Any
    answer: Connection
    slot: int
    log: Path


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if named is not None:
        return [one for one in named.split(",") if one.strip()][:count]
    return [str(index) for index in range(count)]


def _threads() -> int | None:
    """OMP_NUM_THREADS, of which OpenMP allows one number for each level; whoever sets it knows who else is at work."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) or None if first.isdecimal() else None


def run_locally(
    runs: Sequence[Run], folder: Path, workers: int | None = None, started: Callable[[Run], None] = lambda run: None
) -> Iterator[Outcome]:
    """Take `runs` in processes, `workers` at a time (default: one a GPU, or one), and yield each as it ends.

    A run that dies takes no other with it. When the loop over this is left early, or Ctrl-C comes, the running
    processes stop with a checkpoint.
    """
    gpus = visible_gpus()
    at_once = workers or max(1, len(gpus))
    threads = _threads() or max(1, (os.cpu_count() or 1) // at_once)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # The libraries are loaded once; each run then starts in a fork of that process, before any thread or GPU.
        context.set_forkserver_preload(["ziggurat.compare.worker"])
    waiting, active = deque(runs), {}
    free = list(range(at_once))
    try:
        while waiting or active:
            while waiting and free:
                run, slot = waiting.popleft(), free.pop(0)
                one = _start(context, run, folder, slot, gpus[slot % len(gpus)] if gpus else None, threads)
                active[one.process.sentinel] = one
                started(run)
            for sentinel in wait(list(active), timeout=1.0):
                one = active.pop(sentinel)
                free.append(one.slot)
                yield _outcome(one)
    finally:
        _stop(list(active.values()))


def _start(context: Any, run: Run, folder: Path, slot: int, gpu: str | None, threads: int) -> _Active:
    log = log_of(folder, Path(run.recipe.folder).name)
    ours, theirs = context.Pipe(duplex=False)
    arguments = (run.recipe, run.evaluation, loaded(), str(log), gpu, threads, theirs)
    process = context.Process(target=serve, args=arguments)
    process.start()
    theirs.close()
    return _Active(run, process, ours, slot, log)


def _outcome(one: _Active) -> Outcome:
    # The answer may be larger than the pipe holds, so it is read before the process is waited for.
    said: Any = ""
    status, where = "failed", surroundings()  # a worker that died said nothing, but it was on this machine
    try:
        if one.answer.poll():
            status, said, where = one.answer.recv()
    except EOFError:
        pass
    one.process.join()
    code = one.process.exitcode
    if status == "done":
        return Outcome(one.run, "done", info=said, log=str(one.log), where=where)
    if not said:
        how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        said = f"the process was {how}" if code and code < 0 else f"the process {how}"
    return Outcome(one.run, status, error=said, log=str(one.log), where=where)


def _stop(active: list[_Active]) -> None:
    for one in active:
        one.process.terminate()
    for one in active:
        one.process.join(PATIENCE)
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
