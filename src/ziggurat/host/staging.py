"""Writing a folder so that nobody ever sees half of it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ziggurat.errors import ExportError


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        ExportError: `target` exists and isn't an empty folder. Nothing is overwritten.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and isn't an empty folder: name another, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                _sync(file)
        folder.chmod(0o777 & ~_umask())
        if target.is_dir():
            target.rmdir()
        folder.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Make the disk hold what was written; a rename before that can leave an empty file after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
