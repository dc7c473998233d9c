"""The processes of one run, as `accelerate launch` and `torchrun` start them: ranks, broadcasts, barriers.

A run that no launcher started is one process without a process group: every function here is then a plain call.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ziggurat.errors import ProcessError

T = TypeVar("T")

#: A launcher's environment variable -> the name of its way of training; the first one that is set counts.
_WAYS = (("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_FSDP", "fsdp"))

#: How long a process that lost another one waits for that one's own error message.
_SECONDS_TO_SPEAK = 3


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Rank 0, the main process, alone prints and writes. `way` is "one", "ddp", "fsdp" or "deepspeed". `group` is a
    process group on the CPU whatever the devices use: agreeing once a step never waits for a device.
    """

    rank: int = 0
    size: int = 1
    way: str = "one"
    group: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if each process may hold only a shard of a parameter."""
        return self.way in ("fsdp", "deepspeed")

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process; all get its result, or its error."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]  # result, error
        if self.main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @contextlib.contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Each machine's first process runs the block before its others, which then use its caches."""
        if self.size > 1 and not self._first_here:
            self.wait()
        yield
        if self.size > 1 and self._first_here:
            self.wait()

    @property
    def _first_here(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", "0") or 0) == 0

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    @contextlib.contextmanager
    def reporting_lost_processes(self) -> Iterator[None]:
        """Turn the libraries' errors after another process has died into ProcessError."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            if not _is_disconnection(error):
                is_first_to_report()  # before the way up, which may take longer than others wait for the reason
                raise
            # The process that ended gives its reason first, if it can. The launcher's SIGTERM must not end this one
            # meanwhile, which speaks where that one was killed.
            with contextlib.suppress(ValueError):  # in another thread than the main one
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(_SECONDS_TO_SPEAK)
            raise ProcessError(
                f"{self} lost the connection to another one, which ended with its own error message, or was killed "
                "without one, as happens when the machine runs out of memory"
            ) from error


def is_main() -> bool:
    """True in the main process; known before `join` from the launcher's environment variables."""
    return launched_size() == 1 or os.environ.get("RANK", "0") == "0"


def launched_size() -> int:
    """The number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def join() -> Processes:
    """Connect this process with the others that the launcher started; without a launcher it is the only one.

    Raises:
        ProcessError: they can't be connected over this machine's device.
    """
    size = launched_size()
    way = next((way for key, way in _WAYS if os.environ.get(key, "").lower() == "true"), "ddp")
    if size == 1:
        return Processes(way=way if way != "ddp" else "one")
    from accelerate import PartialState

    if not torch.accelerator.is_available() and way != "deepspeed":
        # accelerate connects processes over CPUs only if its configuration asks for them.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    if state.num_processes != size:
        raise ProcessError(
            f"{size} processes were launched, but accelerate can't connect them over this machine's {state.device}; "
            "ACCELERATE_USE_CPU=true in the environment trains on its CPU"
        )
    return Processes(state.process_index, state.num_processes, way, dist.new_group(backend="gloo"))


def is_first_to_report() -> bool:
    """True in the first process that calls this, which prints the reason of a run's end; True too if it can't ask.

    Each process that fails, or is stopped, calls it before it ends. Processes that fail as a consequence print nothing.
    """
    if launched_size() == 1:
        return True
    rank = os.environ.get("RANK", "0")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.compare_set(f"ziggurat/speaks/{attempt}", "", rank).decode() == rank
    except (KeyError, ValueError, RuntimeError):
        return True


def _is_disconnection(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or any(
        sign in str(error) for sign in ("onnection closed by peer", "onnection reset by peer", "gloo", "NCCL")
    )
