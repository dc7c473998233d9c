"""Running code that a model wrote: in a process of its own, with limits on time, memory and files.

This keeps mistakes in bounds, endless loops and memory eaten; it is no wall against code that means harm: the process
runs as the same user and can read files and reach the network. Run models you don't trust in a container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

#: Seconds and MiB that one program may use.
SECONDS, MEBIBYTES = 10.0, 1024

_LIMITS = """
import resource, sys
seconds, size = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
program = sys.stdin.read()
exec(compile(program, "<generated>", "exec"), {"__name__": "__main__"})
print("@passed@")
"""


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end, and the last line it complained with if not."""

    passed: bool
    reason: str = ""


def run_program(program: str, seconds: float = SECONDS, mebibytes: int = MEBIBYTES) -> Verdict:
    """Run `program` and say whether it came to its end without an error.

    It runs in an empty folder that is removed afterwards, with an empty environment, Python's isolated mode, at most
    `seconds` of time (processor and clock), `mebibytes` of memory, files of 1 MiB, and its whole process group is
    killed at the end.
    """
    words = [sys.executable, "-I", "-S", "-c", _LIMITS, str(max(1, round(seconds))), str(mebibytes * 2**20)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(  # noqa: S603
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": os.defpath},
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(program, timeout=seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"not done after {seconds:g} seconds")
        finally:
            _end(process)
    if process.returncode == 0 and out.endswith("@passed@\n"):
        return Verdict(True)
    lines = err.strip().splitlines()
    return Verdict(False, lines[-1] if lines else f"ended with code {process.returncode}")


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def humaneval_program(prompt: str, answer: str, test: str, entry_point: str) -> str:
    """The program that passes if the completion is right [Chen et al. 2021]."""
    return f"{prompt}{answer}\n{test}\ncheck({entry_point})\n"
