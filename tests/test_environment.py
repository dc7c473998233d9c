"""`.ci/environment`, which `make demo` and `make test` begin with: its refusals, and calls that have nothing to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="a script for bash")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    for name in (".ci/environment", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def environment(clone: Path, tools: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with `tools` before the system's own, and without uv and any other python."""
    for name in ("bash", "dirname", "cat", "cksum", "tr", "head", "rm"):
        actual = shutil.which(name)
        assert actual is not None
        tools.mkdir(exist_ok=True)
        if not (tools / name).exists():
            (tools / name).symlink_to(actual)
    env = {"PATH": str(tools), "HOME": str(clone), **variables}
    command = [str(tools / "bash"), ".ci/environment", "dev"]
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=False)


def test_a_python_that_is_too_old(clone: Path) -> None:
    tool(clone / "tools", "python3", 'case "$1" in --version) echo Python 3.9.2;; *) echo 3.9;; esac')
    done = environment(clone, clone / "tools")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Python 3.11 to 3.14 is needed, and here is Python 3.9.2: install it" in done.stderr
    assert "make demo PYTHON=/path/to/python3" in done.stderr


def test_a_python_without_venv(clone: Path) -> None:
    tool(clone / "tools", "python3", 'case "$2" in *venv*) exit 1;; *) echo 3.12;; esac')
    done = environment(clone, clone / "tools")
    assert (
        done.returncode == 1
        and "has no venv: install it (Debian, Ubuntu: apt-get install python3.12-venv)" in done.stderr
    )


def test_nothing_is_installed_twice(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    log = clone / "asked"
    tool(
        clone / ".venv/bin",
        "python",
        f'case "$*" in *version_info*) echo 3.12;; *--version*) ;; *) echo "$*" >>{log};; esac',
    )
    first = environment(clone, clone / "tools")
    assert first.returncode == 0 and "pip install" in log.read_text() and "-e .[dev]" in log.read_text()
    log.unlink()
    second = environment(clone, clone / "tools")
    assert second.returncode == 0 and not log.exists() and second.stdout == ""
    with (clone / "constraints.txt").open("a") as lock:
        lock.write("# changed\n")
    assert environment(clone, clone / "tools").returncode == 0 and log.exists()


def test_an_install_that_was_cut_off_is_done_again(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    log = clone / "asked"
    fails = clone / "fails"
    tool(
        clone / ".venv/bin",
        "python",
        f'case "$*" in *version_info*) echo 3.12;; *--version*) ;; *) echo "$*" >>{log}; [ ! -e {fails} ];; esac',
    )
    fails.touch()
    assert environment(clone, clone / "tools").returncode != 0
    fails.unlink()
    log.unlink()
    assert environment(clone, clone / "tools").returncode == 0 and log.exists()


def test_this_python_fits() -> None:
    assert (3, 11) <= sys.version_info[:2] < (3, 15)
