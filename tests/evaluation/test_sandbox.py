"""The limits that generated code runs under."""

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from ziggurat.evaluation.sandbox import humaneval_program, run_program


def test_right_and_wrong_answers() -> None:
    parts = ("def add(a, b):\n", "    return a + b\n", "def check(f):\n    assert f(1, 2) == 3\n", "add")
    assert run_program(humaneval_program(*parts)).passed
    wrong = run_program(humaneval_program(parts[0], "    return a - b\n", *parts[2:]))
    assert not wrong.passed and "AssertionError" in wrong.reason
    assert "SyntaxError" in run_program(humaneval_program(parts[0], "    return a +\n", *parts[2:])).reason


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('@passed@'); import os; os._exit(1)",
        "print('@passed@', flush=True); import os; os._exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import sys; sys.exit = os = print; raise ValueError",
    ],
)
def test_leaving_early_is_no_pass(program: str) -> None:
    assert not run_program(program).passed


def test_an_endless_loop_ends() -> None:
    begun = time.monotonic()
    assert not run_program("while True: pass", seconds=2).passed
    assert not run_program("import time\ntime.sleep(600)", seconds=2).passed
    assert time.monotonic() - begun < 60


def test_what_is_printed_is_thrown_away() -> None:
    assert run_program("import sys\nfor file in (sys.stdout, sys.stderr): print('x' * 3_000_000, file=file)").passed
    tracemalloc.start()
    for name in ("stdout", "stderr"):
        endless = f"import sys\nwhile True: sys.{name}.write('x' * 1000)"
        assert run_program(endless, seconds=2).reason == "not done after 2 seconds"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_the_time_limit_holds_where_a_child_has_left_the_group(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = (
        f"os.setsid()\n    end = time.time() + 90\n    while not os.path.exists({str(mark)!r}) and time.time() < end:"
    )
    program = f"import os, time\nif os.fork() == 0:\n    {child} time.sleep(0.1)\n    os._exit(0)\n"
    begun = time.monotonic()
    assert run_program(program + "time.sleep(600)", seconds=2).reason == "not done after 2 seconds"
    assert run_program(program, seconds=2).passed
    took = time.monotonic() - begun
    mark.touch()
    assert took < 60


def test_memory_and_files_are_bounded(tmp_path: Path) -> None:
    assert "MemoryError" in run_program("x = bytearray(3 * 2**30)").reason
    assert not run_program("open('big', 'wb').write(b'0' * 2**24)").passed
    assert run_program("import os\nassert os.listdir('.') == []\nopen('small', 'w').write('x')").passed


def test_nothing_of_ours_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    assert run_program("import os\nassert 'A_SECRET' not in os.environ").passed
    assert os.environ["A_SECRET"] == "1"


def test_children_end_with_the_program(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w').write('x')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    assert run_program(program, seconds=2).passed in (True, False)
    time.sleep(5)
    assert not mark.exists()
