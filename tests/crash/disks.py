"""Small disks that can be filled up and made read-only, for real where this process may mount one."""

import os
import resource
import subprocess
from pathlib import Path

import pytest


class Disk:
    """A folder on a disk of its own, of a few MiB."""

    #: Whether it is a disk; else a folder, and `fill` limits the length of every file this process writes.
    real = True

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder))

    def fill(self, leave: int = 0) -> None:
        """Leave only so many bytes."""
        (self.folder / "filler").unlink(missing_ok=True)
        free = os.statvfs(self.folder)
        with (self.folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - leave, 1))

    def empty(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def make_read_only(self) -> None:
        _run("mount", "-o", "remount,ro", str(self.folder))

    def make_writable(self) -> None:
        _run("mount", "-o", "remount,rw", str(self.folder))

    def close(self) -> None:
        _run("umount", "-l", str(self.folder))


class Limits(Disk):
    """What there is without the right to mount: a limit on the length of files, and permissions."""

    real = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave: int = 0) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (leave, self._before[1]))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)

    def make_read_only(self) -> None:
        if os.geteuid() == 0:
            pytest.skip("root passes by permissions, and this one may not mount a read-only disk")
        self.folder.chmod(0o555)

    def make_writable(self) -> None:
        self.folder.chmod(0o755)

    def close(self) -> None:
        self.empty()
        self.make_writable()


def make_disk(folder: Path, mebibytes: int) -> Disk:
    """A real small disk, or the limits that stand in for one."""
    try:
        return Disk(folder, mebibytes)
    except (OSError, subprocess.CalledProcessError):
        folder.rmdir()
        return Limits(folder)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
