"""Atomic writing, with clear errors for full, read-only or forbidden disks."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ziggurat.errors import ExportError, StorageError

#: Error numbers of failed writes -> their meaning in words.
_TROUBLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than the file system or a limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing there is not allowed",
    errno.EPERM: "writing there is not allowed",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.EIO: "the disk reports an error",
}
#: Windows' numbers of failed writes -> their meaning in words.
_WINDOWS = {
    5: "writing there is not allowed, or a program has a file there open",
    19: "the disk is write-protected",
    **dict.fromkeys((32, 33, 1224), "a program has the file open"),
    **dict.fromkeys((39, 112), "the disk is full"),
}
#: The same error numbers, on Windows its own, in Rust's messages, which safetensors passes on.
_RUST = re.compile(r"os error (\d+)|\bcode: (\d+)")
#: Messages of torch's writer, which don't contain the number; "unexpected pos" comes from closing such a file.
_TORCH = ("PytorchStreamWriter failed writing", "unexpected pos")


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target` that takes its name when the block ends well, and vanishes otherwise.

    It is synced to the disk before it takes the name. A killed program leaves a folder `.target.*`.

    Raises:
        ExportError: `target` exists and isn't an empty folder. Nothing is overwritten.
        StorageError: the disk is full, read-only or forbidden.
    """
    target = Path(target)
    with told_of_storage(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ExportError(f"{target} exists and isn't an empty folder: name another, or remove it first.")
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o777 & ~_umask())
            open_weights(folder)
            sync_tree(folder)
            if os.name == "nt" and target.is_dir():  # elsewhere a rename replaces an empty folder
                target.rmdir()
            folder.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def write_whole(path: Path, content: str | bytes, then: str = "") -> None:
    """Write a file atomically: it has the old content or the new one, never a part. Texts are in UTF-8.

    `then`: as in `told_of_storage`.

    Raises:
        StorageError: the disk is full, read-only or forbidden; the old content is still there.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with told_of_storage(path, then):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(beside)
            beside.replace(path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def check_writable(path: Path) -> None:
    """Check, before hours of work, whether a small file could be written to `path`. Leaves no file and no folder.

    Raises:
        StorageError: it can't, or it is a folder.
    """
    path = Path(path)
    with told_of_storage(path):
        if path.is_dir():
            raise StorageError(f"'{path}' is a folder: name a file in it.")
        home = path.parent
        while not home.exists():
            home = home.parent
        # Not empty: a full disk still takes names.
        with tempfile.NamedTemporaryFile(dir=home, prefix=f".{path.name}.", buffering=0) as file:
            file.write(bytes(4096))


def open_weights(folder: Path) -> None:
    """Give the weights in `folder` the permissions of the umask, like other files: safetensors makes them private.

    Files of other owners, and file systems without modes, stay as they are.
    """
    mode = 0o666 & ~_umask()
    for file in folder.rglob("*.safetensors"):
        with contextlib.suppress(PermissionError):
            if not file.is_symlink():
                file.chmod(mode)


def sync_tree(folder: Path) -> None:
    """Sync the folder and everything in it to the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Sync a file or folder to the disk; a rename before that can leave an empty file after a power cut."""
    if os.name == "nt":  # knows no fsync of folders, nor of files opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told_of_storage(place: Path | str, then: str = "") -> Iterator[None]:
    """Turn errors of a full, read-only or forbidden disk in the block into StorageError, with the place.

    `then`: a sentence about the files that remain and what to do.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        trouble = storage_trouble(error)
        if trouble is None:
            raise
        reason = trouble[0].upper() + trouble[1:]
        raise StorageError(
            f"{reason}: '{place}' could not be written. {then or 'Nothing was changed there.'}"
        ) from error


def storage_trouble(error: BaseException | None) -> str | None:
    """The reason why a write failed, in words; None if the error is of another kind."""
    if error is None:
        return None
    trouble = None
    if isinstance(error, OSError) and error.errno is not None:
        trouble = _WINDOWS.get(getattr(error, "winerror", None) or 0) or _TROUBLE.get(error.errno)
    elif numbers := _RUST.search(str(error)):
        trouble = (_WINDOWS if os.name == "nt" else _TROUBLE).get(int(numbers[1] or numbers[2]))
    elif any(sign in str(error) for sign in _TORCH):
        trouble = "the disk took only a part, as a full one does"
    return trouble or storage_trouble(error.__cause__ or error.__context__)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
