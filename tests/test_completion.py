"""Completion in a shell: commands, recipes, keys and files, by bash, zsh and fish themselves."""

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from ziggurat.cli import app
from ziggurat.cli.complete import recipe_words

pty = pytest.importorskip("pty")  # Windows has none
#: What a shell runs first, and its line with the command that was completed.
SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], "bind 'set bell-style none'; eval \"$(ziggurat --show-completion)\""),
    "zsh": (["-f", "-i"], 'autoload -U compinit; compinit -u; eval "$(ziggurat --show-completion)"'),
}


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_value_is_completed_as_a_file_whatever_holds_the_words(kind: type) -> None:
    """Bash passes a value as a word of its own, and completes files itself."""
    ctx = typer.Context(typer.main.get_command(app))
    ctx.params["words"] = kind(["roberta-mrpc", "data.train", "="])
    assert recipe_words(ctx, "rob") == []
    ctx.params["words"] = kind(["roberta-mrpc"])
    assert recipe_words(ctx, "rob")


def test_a_single_folder_is_completed_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other shells pass `KEY=VALUE` whole. They append a space to a single candidate, which ends no folder's path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows[1]" / "more").mkdir(parents=True)
    for name in ("reviews.csv", "rows[1]/a.csv"):
        (tmp_path / name).touch()
    ctx = typer.Context(typer.main.get_command(app))
    offered = {word: [path for path, _ in recipe_words(ctx, f"data.train={word}")] for word in ("re", "r", "ro", "x")}
    in_folder = ["data.train=rows[1]/", "data.train=rows[1]/a.csv", "data.train=rows[1]/more/"]
    assert offered == {
        "re": ["data.train=reviews.csv"],
        "r": ["data.train=reviews.csv", "data.train=rows[1]/"],
        "ro": in_folder,
        "x": [],
    }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with a table, and an environment in which `ziggurat` is this package's command."""
    program = tmp_path / "bin" / "ziggurat"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import ziggurat_command as z; z.main()' \"$@\"\n")
    program.chmod(0o755)
    (tmp_path / "reviews.csv").touch()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    yield tmp_path, {**os.environ, "PATH": path, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_recipes_keys_and_files(shell: str, place: tuple[Path, dict[str, str]]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    folder, env = place
    options, begin = SHELLS[shell]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe(shell, [shell, *options], {**env, "PS1": "> ", "TERM": "dumb"})
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
        types(f"{begin}; echo do''ne\n", "done\r")
        types("ziggurat tra\t", "train ")
        types("roberta-mr\t", "roberta-mrpc ")
        types("train.epo\t", "train.epochs=")
        types("5 data.train=rev\t", "data.train=reviews.csv")
        types("\x01echo \n", "\nziggurat train roberta-mrpc train.epochs=5 data.train=reviews.csv")
    finally:
        os.close(terminal)  # the shell ends with its terminal
        os.waitpid(child, 0)


def test_fish_completes_commands_recipes_keys_and_files(place: tuple[Path, dict[str, str]]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("no fish")
    folder, env = place
    words = {"tra": "train", "train roberta-mr": "roberta-mrpc", "train x train.epo": "train.epochs="}
    words["train x data.train=rev"] = "data.train=reviews.csv"
    script = "; ".join(["ziggurat --show-completion fish | source", *(f"complete -C 'ziggurat {w}'" for w in words)])
    done = subprocess.run(["fish", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    offered = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    assert [word for word in offered if word in words.values()] == list(words.values()), done
