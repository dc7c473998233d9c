"""Programs in processes of their own, without each paying for the import of torch and transformers again.

One process has imported those, and not ziggurat; each program runs in a fork of it. Where forks aren't safe (macOS,
Windows) each gets an interpreter instead.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TO_TRAIN = "datasets, peft, sklearn.metrics, transformers.trainer"
FORKS = sys.platform == "linux"

_WAIT = """
import gc, json, os, sys, traceback
import IMPORTS

def run(program, words, folder, out, err):
    for stream, place in enumerate((os.devnull, out, err)):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), stream)
    os.chdir(folder)
    sys.argv = [program, *words]
    names = {"__name__": "__main__", "__file__": program}
    code = 0
    try:
        exec(compile(open(program, encoding="utf-8").read(), program, "exec"), names)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

assert "ziggurat" not in sys.modules
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


class Fresh:
    """Runs programs one after another, each in a process of its own that has the variables of `env`.

    `imports`: the modules that are there already, which must not start threads.
    """

    def __init__(self, place: Path, imports: str = TO_TRAIN, **env: str) -> None:
        self.place, self.imports, self.count = place, imports, 0
        # accelerate and tests of it leave settings behind in this process.
        self.env = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "FSDP_"))} | env
        self._waiting: Any = None

    def run(self, program: str, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The text `program` in `folder`, as `python program words`; a failing one is returned like others."""
        self.count += 1
        file, out, err = (self.place / f"{self.count}.{what}" for what in ("py", "out", "err"))
        file.write_text(program, encoding="utf-8")
        if not FORKS:
            command = [sys.executable, "-W", "ignore", str(file), *words]
            return subprocess.run(command, cwd=folder, env=self.env, capture_output=True, text=True)
        if self._waiting is None:
            command = [sys.executable, "-W", "ignore", "-c", _WAIT.replace("IMPORTS", self.imports)]
            self._waiting = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, text=True
            )
        job = {"program": file, "words": words, "folder": folder or Path.cwd(), "out": out, "err": err}
        self._waiting.stdin.write(json.dumps(job, default=str) + "\n")
        self._waiting.stdin.flush()
        code = int(self._waiting.stdout.readline())
        return subprocess.CompletedProcess(file, code, out.read_text(), err.read_text())

    def run_two(self, work: Callable[..., None], *given: str) -> None:
        """`work(rank, *given)` in two processes at once."""
        program = (
            f"import sys\nfrom torch.multiprocessing import start_processes\nsys.path[:0] = {sys.path!r}\n"
            f"from {work.__module__} import {work.__name__} as work\nif __name__ == '__main__':\n"
            f"    start_processes(work, {given!r}, nprocs=2, start_method={'fork' if FORKS else 'spawn'!r})\n"
        )
        done = self.run(program)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.communicate()
