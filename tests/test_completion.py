"""Completion in a shell: commands, recipes, keys and files, by bash itself in a terminal."""

import os
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")  # Windows has none
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def test_bash_completes_commands_recipes_keys_and_files(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "ziggurat"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import ziggurat_command as z; z.main()' \"$@\"\n")
    program.chmod(0o755)
    (tmp_path / "reviews.csv").touch()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    child, terminal = pty.fork()
    if child == 0:
        env = {**os.environ, "PATH": path, "PS1": "> ", "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], env)
    seen, until = b"", time.monotonic() + 100

    def types(keys: str, shown: str) -> None:
        nonlocal seen
        os.write(terminal, keys.encode())
        while shown.encode() not in seen:
            assert time.monotonic() < until, (shown, seen)
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        seen = seen.partition(shown.encode())[2]

    try:
        types("bind 'set bell-style none'; eval \"$(ziggurat --show-completion)\"; echo do''ne\n", "done")
        types("ziggurat tra\t", "train ")
        types("roberta-mr\t", "roberta-mrpc ")
        types("train.epo\t", "train.epochs=")
        types("5 data.train=rev\t", "data.train=reviews.csv")
        types("\x01echo \n", "\nziggurat train roberta-mrpc train.epochs=5 data.train=reviews.csv")
    finally:
        os.close(terminal)  # bash ends with its terminal
        os.waitpid(child, 0)
