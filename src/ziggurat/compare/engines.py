"""The runs of a table, several at a time: in processes of this machine, or as tasks of a Ray cluster.

An engine has `at_once`, how many runs go on at a time (None: as many as it takes). `start` returns a handle of a run,
`ended` the handles of ended runs among some (it waits a second at most), `answer` the answer of one. `stop` stops runs
with a checkpoint, and returns when all have ended or PATIENCE is over.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ziggurat.errors import RecipeError, first_line
from ziggurat.extras import require
from ziggurat.host.plugins import loaded

from .surroundings import surroundings
from .table import Run
from .worker import Answer, log_of, serve, serve_ray

#: Seconds that stopped runs have to write their checkpoints.
PATIENCE = 120
#: How often Ray starts a run again whose worker died.
RETRIES = 3


@dataclass(frozen=True)
class Outcome:
    """The end of a run: `done` with its run.json, `failed` or `stopped` with the reason, and the path of its log.

    `where`: the surroundings of the worker; for a worker that died, as far as this program knows them.
    """

    run: Run
    status: str
    info: dict[str, Any] | None = None
    error: str = ""
    log: str | None = None
    where: dict[str, Any] = field(default_factory=dict)


def run_all(
    runs: Sequence[Run],
    folder: Path,
    engine: str = "local",
    workers: int | None = None,
    started: Callable[[Run], None] = lambda run: None,
) -> Generator[Outcome]:
    """Start `runs`, `workers` at a time, with their logs in `folder`, and yield each as it ends.

    `engine` is "local" (default for `workers`: one per GPU, or one) or "ray" (as many as the cluster takes). A run that
    dies takes no other with it. When the loop over this is left early, or Ctrl-C comes, the running ones stop with a
    checkpoint.

    Raises:
        MissingExtraError: Ray is asked for and isn't installed.
        RecipeError: there is no such engine.
    """
    check_engine(engine)
    backend: Any = ENGINES[engine](workers)
    waiting, active = deque(runs), {}
    try:
        while waiting or active:
            while waiting and (backend.at_once is None or len(active) < backend.at_once):
                run = waiting.popleft()
                log = log_of(folder, Path(run.recipe.folder).name)
                active[backend.start(run, log)] = run, str(log)
                started(run)
            for handle in backend.ended(list(active)):
                run, log = active.pop(handle)
                status, content, where = backend.answer(handle)
                result = {"info": content} if status == "done" else {"error": content}
                yield Outcome(run, status, log=log, where=where, **result)
    finally:
        backend.stop(list(active))


@dataclass(frozen=True, eq=False)
class _Process:
    """A process with its end of the pipe that the answer comes through, and its place among those that run at once."""

    process: Any
    pipe: Any
    slot: int


class Local:
    """Processes of this machine, one per GPU where there are GPUs."""

    def __init__(self, workers: int | None) -> None:
        self.gpus = visible_gpus()
        self.at_once: int = workers or max(1, len(self.gpus))
        self.threads = _threads() or max(1, (os.cpu_count() or 1) // self.at_once)
        self.free = list(range(self.at_once))
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            # The libraries are loaded once; each run then starts in a fork of that process, before any thread or GPU.
            self.context.set_forkserver_preload([serve.__module__])
            _start_fork_server()

    def start(self, run: Run, log: Path) -> _Process:
        slot = self.free.pop(0)
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        receiver, sender = self.context.Pipe(duplex=False)
        arguments = (run.recipe, run.evaluation, loaded(), str(log), gpu, self.threads, sender)
        process = self.context.Process(target=serve, args=arguments)
        process.start()
        sender.close()
        return _Process(process, receiver, slot)

    def ended(self, handles: list[_Process]) -> list[_Process]:
        # A pipe is readable when an answer arrives, even one larger than its buffer, and when its process has died.
        at = {handle.pipe: handle for handle in handles}
        return [at[pipe] for pipe in wait(list(at), timeout=1.0)]

    def answer(self, handle: _Process) -> Answer:
        self.free.append(handle.slot)
        try:
            answer = handle.pipe.recv()
        except EOFError:
            answer = None
        handle.process.join()
        if answer is not None:
            return answer
        code = handle.process.exitcode or 0
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return "failed", f"the process {ending}", surroundings()  # it was on this machine

    def stop(self, handles: list[_Process]) -> None:
        for handle in handles:
            handle.process.terminate()
        for handle in handles:
            handle.process.join(PATIENCE)
            if handle.process.is_alive():
                handle.process.kill()
                handle.process.join()


def _start_fork_server() -> None:
    """Start it with SIGTERM blocked, until it ends with this program; `serve` lets the signal through to a run.

    A scheduler signals all processes of a job, and who asks for the end of a fork asks the server.
    """
    resource_tracker.ensure_running()  # the server starts it, too, and it would let the signal through again
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class OnRay:
    """Tasks of the cluster at RAY_ADDRESS (a local one is started without it), each on a GPU where the cluster has any.

    A run whose worker dies goes on with another, so all machines must see the table's folder under the same path: a
    run's checkpoints are there.
    """

    def __init__(self, workers: int | None) -> None:
        require("engine: ray", "ray")
        import ray

        self.ray: Any = ray
        self.at_once = workers
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        self.task = ray.remote(serve_ray).options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)

    def start(self, run: Run, log: Path) -> Any:
        place = str(Path(run.recipe.folder).expanduser().resolve())
        recipe = run.recipe.model_copy(update={"output": place})
        return self.task.remote(recipe, run.evaluation, loaded(), str(log.resolve()))

    def ended(self, handles: list[Any]) -> list[Any]:
        return self.ray.wait(handles, timeout=1.0)[0]

    def answer(self, handle: Any) -> Answer:
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            return "failed", f"{type(error).__name__}: {first_line(error)}", {}

    def stop(self, handles: list[Any]) -> None:
        for handle in handles:
            self.ray.cancel(handle)
        if handles:
            # A cancelled run stops at its next step and writes a checkpoint; with this program its worker would go.
            self.ray.wait(handles, num_returns=len(handles), timeout=PATIENCE)


ENGINES: dict[str, type[Local | OnRay]] = {"local": Local, "ray": OnRay}


def check_engine(name: str) -> None:
    """Raise RecipeError unless there is an engine called `name`."""
    if name not in ENGINES:
        raise RecipeError(f"engine: '{name}' is not one of {', '.join(ENGINES)}")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if names is not None:
        return [name for name in names.split(",") if name.strip()][:count]
    return [str(index) for index in range(count)]


def _threads() -> int | None:
    """OMP_NUM_THREADS, which may have one number for each level; it is respected if it is set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) or None if first.isdecimal() else None
