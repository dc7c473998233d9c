"""The working folder of a run, safe against kills at any point.

`recipe.yaml` is written first and deleted first: a folder without it is garbage and may be removed. A result is
finished when its folder is renamed to `done`; the next program moves it to its place.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ziggurat.errors import RecipeError
from ziggurat.files.staging import open_weights, storage_trouble, sync, sync_tree, told_of_storage
from ziggurat.recipe.run_files import PROGRESS, RECIPE, RUN

#: The finished result before it is moved to its place, and the folder that it replaces.
DONE, REPLACED = "done", "replaced"
#: Exists if the run may replace the folder in the result's place, also when the run is resumed.
MAY_REPLACE = "may-replace"
#: Locked while a run is alive; a file that reserves disk space for the result.
LOCK, ROOM = "lock", "room"
READY, CHECKPOINTS = "ready", "checkpoints"
#: For TensorBoard; copied into the result.
LOGS = "logs"


class Lock:
    """Keeps other processes out of a working folder; the system releases it when this process dies.

    A lock of the process, not of the open file: child processes that prepare batches don't inherit it.
    Without `fcntl`, as on Windows, it is filelock's: child processes there don't inherit open files.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / LOCK
        self._unlock: Callable[[], Any] | None = None

    @property
    def held(self) -> bool:
        return self._unlock is not None

    def take(self) -> bool:
        """Returns False if another process holds it. On a file system without locks it always succeeds."""
        if self.held:
            return True
        try:
            import fcntl
        except ImportError:
            return self._take_without_fcntl()
        file = self.path.open("w")
        self._unlock = file.close
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            return False
        except OSError:
            pass
        return True

    def _take_without_fcntl(self) -> bool:
        from filelock import FileLock, Timeout

        lock = FileLock(self.path, blocking=False)
        try:
            lock.acquire()
        except Timeout:  # an OSError, too
            return False
        except (OSError, NotImplementedError):
            pass
        self._unlock = lock.release
        return True

    def is_taken(self) -> bool:
        """Whether another process holds it."""
        if self.held or not self.path.is_file():
            return False
        taken = not self.take()
        self.release()
        return taken

    def release(self) -> None:
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
            with contextlib.suppress(OSError):  # empty where a locked file couldn't be deleted with its folder
                self.path.parent.rmdir()


def make(work: Path, files: Mapping[str, str]) -> None:
    """Make the working folder atomically with these texts in it. Raises StorageError."""
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
    """Reserve the disk space that the result will need: hours later the disk may be full.

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
    """Free the space that `reserve` took."""
    with contextlib.suppress(OSError):
        (work / ROOM).unlink(missing_ok=True)


def new_result(work: Path) -> Path:
    """An empty folder for the result; the reserved space is freed for it."""
    release(work)
    ready = work / READY
    if ready.exists():  # of a run that was killed while it wrote
        shutil.rmtree(ready)
    ready.mkdir()
    return ready


def keep_logs(work: Path, ready: Path) -> None:
    """Copy the logs into the result. A run that is killed here, and resumed, still has them."""
    if (work / LOGS).is_dir():
        shutil.copytree(work / LOGS, ready / LOGS)


def finish(work: Path, ready: Path) -> None:
    """Declare the result in `ready` whole."""
    open_weights(ready)
    sync_tree(ready)
    ready.rename(work / DONE)
    sync(work)


def settle(work: Path, final: Path, may_replace: Callable[[Path], bool]) -> None:
    """Move a finished result to its place, and remove the leftovers of a finished run whose program was killed.

    Raises:
        RecipeError: another folder is in the place, and `may_replace` refuses to replace it; the result waits.
        StorageError: the disk is read-only or forbidden.
    """
    done = work / DONE
    if done.is_dir():
        with told_of_storage(final, f"The finished result is in '{done}'."):
            if filled(final):
                if not may_replace(final):
                    raise RecipeError(
                        f"output: '{final}' was filled by something else meanwhile; the result is in '{done}'. "
                        "Move one of them away"
                    )
                final.rename(work / REPLACED)
            elif os.name == "nt" and final.exists():  # elsewhere a rename replaces an empty folder
                final.rmdir()
            # From here on no checkpoint counts: a program killed now leaves no run that looks unfinished.
            (work / RECIPE).unlink(missing_ok=True)
            sync(work)
            done.rename(final)
            sync(final.parent)
    if work.is_dir() and not (work / RECIPE).exists() and _is_ours(work):
        discard(work)


def filled(place: Path) -> bool:
    """True if a file or a folder that isn't empty is there."""
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


def _is_ours(work: Path) -> bool:
    """True if a working folder without a recipe is the rest of a killed run, and not somebody else's folder."""
    run_files = {RUN, DONE, REPLACED, MAY_REPLACE, LOCK, ROOM, READY, CHECKPOINTS, LOGS, PROGRESS}
    return {path.name for path in work.iterdir()} <= run_files
