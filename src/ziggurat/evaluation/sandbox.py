"""Running code that a model wrote in a separate process, with limits on time, memory and files.

This limits mistakes such as endless loops and memory use; it is no protection against malicious code: the process runs
as the same user and can read files and reach the network. Run untrusted models in a container.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

#: Seconds and MiB that one program may use.
SECONDS, MEBIBYTES = 10.0, 1024
_PASSED = "@passed@"

#: The program's output is discarded; the verdict has a separate file descriptor.
_LIMITS = """
import os, resource, sys, traceback
seconds, size, passed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
verdict = os.dup(1)
os.dup2(2, 1)
program = sys.stdin.buffer.read().decode()
try:
    exec(compile(program, "<generated>", "exec"), {"__name__": "__main__"})
except Exception as error:
    os.write(verdict, "".join(traceback.format_exception_only(error)).strip().encode("utf-8", "replace")[-4000:])
    os._exit(1)
else:
    os.write(verdict, passed)
"""


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end, and the last line of its error if not."""

    passed: bool
    reason: str = ""


def run_program(program: str, seconds: float = SECONDS, mebibytes: int = MEBIBYTES) -> Verdict:
    """Run `program` and report whether it ended without an error.

    It runs in an empty folder that is removed afterwards, with an empty environment, Python's isolated mode, at most
    `seconds` of time (processor and clock), `mebibytes` of memory, files of 1 MiB, and its whole process group is
    killed at the end. Its output is discarded.
    """
    words = [sys.executable, "-I", "-S", "-c", _LIMITS, str(max(1, round(seconds))), str(mebibytes * 2**20), _PASSED]
    # Files instead of pipes: a child that has left the group would hold a pipe open beyond the time limit.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as verdict,
    ):
        source.write(program.encode("utf-8", "replace"))
        source.seek(0)
        process = subprocess.Popen(  # noqa: S603
            words,
            stdin=source,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"not done after {seconds:g} seconds")
        finally:
            _end(process)
        verdict.seek(0)
        output = verdict.read(2**20).decode("utf-8", "replace")
    if code == 0 and output == _PASSED:
        return Verdict(True)
    lines = output.splitlines()
    return Verdict(False, lines[-1] if lines and code != 0 else f"ended with code {code}")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def humaneval_program(prompt: str, answer: str, test: str, entry_point: str) -> str:
    """The program that passes if the completion is right [Chen et al. 2021]."""
    return f"{prompt}{answer}\n{test}\ncheck({entry_point})\n"
