"""The time, hardware and commit of a run, determined in its process."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any


def surroundings() -> dict[str, Any]:
    """The time, the hardware, and the commit of this package (if it is a git checkout)."""
    return {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(), "commit": commit()}


@cache
def commit() -> str | None:
    """The commit of this package's checkout, with `+changes` if files differ; None if installed."""
    package = str(Path(__file__).parents[1])

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", package, *words],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails if another project's checkout contains the package
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, and the accelerators that this process may use."""
    import torch

    values: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        values["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return values


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
