"""Completion in a shell: commands, recipes, keys and files, by bash itself in a terminal."""

import os
import select
import shutil
import sys
import time
from pathlib import Path

import pytest
import typer

from ziggurat.cli import app
from ziggurat.cli.complete import recipe_words

pty = pytest.importorskip("pty")  # Windows has none
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_value_is_completed_as_a_file_whatever_holds_the_words(kind: type) -> None:
    ctx = typer.Context(typer.main.get_command(app))
    ctx.params["words"] = kind(["roberta-mrpc", "data.train", "="])
    assert recipe_words(ctx, "rob") == []
    ctx.params["words"] = kind(["roberta-mrpc"])
    assert recipe_words(ctx, "rob")


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
