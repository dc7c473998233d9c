"""The working folder of a run, in which a program may be killed at any point.

It appears with its recipe in it and loses the recipe first, so one without is rubbish. A result is finished when it is
called `done`; whoever comes next puts it in its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from ziggurat.errors import RecipeError
from ziggurat.files.staging import open_weights, storage_trouble, sync, sync_tree, told_of_storage

RECIPE, RUN = "recipe.yaml", "run.json"
#: The finished result on its way to its place, and what stood there before.
DONE, REPLACED = "done", "replaced"
#: Says that what stands in the result's place may be replaced, also when the run is resumed.
MAY_REPLACE = "may-replace"
#: Held while a run is alive; keeps the room for the result.
LOCK, ROOM = "lock", "room"
READY, CHECKPOINTS = "ready", "checkpoints"
#: What TensorBoard reads; goes along with the result.
LOGS = "logs"


class Lock:
    """Keeps other processes out of a working folder; the system lets go when this process dies, however it dies.

    A lock of the process, not of the open file: children that prepare batches don't inherit it and outlive nothing.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / LOCK
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self) -> bool:
        """Returns False where another process holds it. A file system without locks lets everybody in."""
        if self.held:
            return True
        self._file = self.path.open("w")
        try:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            return False
        except (ImportError, OSError):
            pass
        return True

    def is_taken(self) -> bool:
        """Whether another process holds it."""
        if self.held or not self.path.is_file():
            return False
        taken = not self.take()
        self.release()
        return taken

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def make(work: Path, files: Mapping[str, str]) -> None:
    """Make the working folder, at once with these texts in it. Raises StorageError."""
    new = work.with_name(f".{work.name}.new")
    with told_of_storage(work):
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            for name, text in files.items():
                (new / name).write_text(text, encoding="utf-8")
            sync_tree(new)
            new.rename(work)
            sync(work.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def discard(work: Path) -> None:
    """Delete the working folder."""
    if work.is_dir():
        (work / RECIPE).unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)


def reserve(work: Path, size: int) -> None:
    """Take the room that the result will need, while there is some: hours later the disk may be full.

    Raises:
        StorageError: there is less than `size` bytes.
    """
    say = f"The result needs {size / 2**20:,.1f} MiB; make room, or choose another output=..."
    with told_of_storage(work, say), (work / ROOM).open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except (AttributeError, OSError) as error:
            if storage_trouble(error) is not None:  # else it is a system that can't do this
                raise


def release(work: Path) -> None:
    """Give back the room that `reserve` took."""
    with contextlib.suppress(OSError):
        (work / ROOM).unlink(missing_ok=True)


def new_result(work: Path) -> Path:
    """An empty folder for the result, in the room kept for it."""
    release(work)
    ready = work / READY
    if ready.exists():  # of a run that was killed while it wrote
        shutil.rmtree(ready)
    ready.mkdir()
    return ready


def keep_logs(work: Path, ready: Path) -> None:
    """Put a copy of the logs into the result; a run that is killed here, and resumed, still has its own."""
    if (work / LOGS).is_dir():
        shutil.copytree(work / LOGS, ready / LOGS)


def finish(work: Path, ready: Path) -> None:
    """Declare the result in `ready` whole."""
    open_weights(ready)
    sync_tree(ready)
    ready.rename(work / DONE)
    sync(work)


def settle(work: Path, final: Path, may_replace: Callable[[Path], bool]) -> None:
    """Put a finished result in its place, and clear away what a killed program left of a run that is over.

    Raises:
        RecipeError: something else has filled the place, which `may_replace` doesn't give up; the result waits.
        StorageError: the disk is read-only or forbidden.
    """
    done = work / DONE
    if done.is_dir():
        with told_of_storage(final, f"The finished result lies in '{done}'."):
            if filled(final):
                if not may_replace(final):
                    raise RecipeError(
                        f"output: '{final}' was filled by something else meanwhile; the result lies in '{done}'. "
                        "Move one of them away"
                    )
                final.rename(work / REPLACED)
            elif os.name == "nt" and final.exists():  # elsewhere a rename replaces an empty folder
                final.rmdir()
            # From here on no checkpoint counts: what is killed now isn't taken for unfinished with its result in place.
            (work / RECIPE).unlink(missing_ok=True)
            sync(work)
            done.rename(final)
            sync(final.parent)
    if work.is_dir() and not (work / RECIPE).exists() and _is_ours(work):
        discard(work)


def filled(place: Path) -> bool:
    """Whether there is anything but an empty folder."""
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


def _is_ours(work: Path) -> bool:
    """Whether a working folder without a recipe is what a killed run left of it, and not somebody else's."""
    known = {RUN, DONE, REPLACED, MAY_REPLACE, LOCK, ROOM, READY, CHECKPOINTS, LOGS}
    return {path.name for path in work.iterdir()} <= known
