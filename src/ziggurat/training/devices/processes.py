"""The processes of one run, as `accelerate launch` and `torchrun` start them: who writes, who waits, who speaks.

A run in one process, launched by nobody, meets no process group: every function here is then a plain call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ziggurat.errors import ProcessError

T = TypeVar("T")

#: How a launcher says which way of training was asked for, in the order in which they are asked.
_ASKED = (("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_FSDP", "fsdp"))


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    `rank` counts from 0, the main process, which alone prints and writes. `way` is "one", "ddp", "fsdp" or "deepspeed".
    `group` talks over the processor, whatever the devices talk over: an agreement a step never waits for a device.
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
        """Whether a parameter may lie in pieces on several processes."""
        return self.way in ("fsdp", "deepspeed")

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"

    def first(self, work: Callable[[], T]) -> T:
        """Let the main process do `work`; all get its result, or its error."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    @contextlib.contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """Each machine's first process goes through the block before its others, which find the caches it filled."""
        if self.size > 1 and not self._first_here:
            self.wait()
        yield
        if self.size > 1 and self._first_here:
            self.wait()

    @property
    def _first_here(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", "0") or 0) == 0

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        told = torch.tensor([number])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
        return int(told)

    @contextlib.contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """Say ProcessError for what the libraries raise where another process has gone."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _says_gone(error):
                raise
            raise ProcessError(
                f"{self} has lost another: it ended with a message of its own, or was killed without one, as a machine "
                "out of memory does"
            ) from error


def is_main() -> bool:
    """Whether this is the main process, told before `join` by what the launcher has set."""
    return launched_size() == 1 or os.environ.get("RANK", "0") == "0"


def launched_size() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def join() -> Processes:
    """The processes that a launcher started this one with, connected; without a launcher: one.

    Raises:
        ProcessError: they can't be connected over this machine's device.
    """
    size = launched_size()
    way = next((way for key, way in _ASKED if os.environ.get(key, "").lower() == "true"), "ddp")
    if size == 1:
        return Processes(way=way if way != "ddp" else "one")
    from accelerate import PartialState

    if not torch.accelerator.is_available() and way != "deepspeed":
        # accelerate connects processes over processors only when told that these are meant.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    if state.num_processes != size:
        raise ProcessError(
            f"{size} processes were launched, but accelerate can't connect them over this machine's {state.device}; "
            "ACCELERATE_USE_CPU=true in the environment trains on its processors"
        )
    return Processes(state.process_index, state.num_processes, way, dist.new_group(backend="gloo"))


def speaks() -> bool:
    """Whether this process is the one to tell why the run ends: the first that asks. True where it can't be known.

    Each process that fails, or is stopped, asks before it ends; what fails next because of it stays silent.
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


def _says_gone(error: RuntimeError) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or any(
        sign in str(error) for sign in ("onnection closed by peer", "onnection reset by peer", "gloo", "NCCL")
    )
