"""`benchmarks/gpu/all.sh`, rehearsed on a CPU: its output, and that a failing part doesn't stop the others."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ziggurat  # noqa: F401 - before benchmarks.gpu.bare, which would put a bare package in its place

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu" / "all.sh"
PARTS = ("kernels", "steps", "linear", "decode")

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="the script needs GNU coreutils")


def rehearse(out: Path, *words: str, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), "--rehearse", "--out", str(out), "--python", str(python), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=290, env=environment)


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def ends(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {row["part"]: row["exit"] for row in rows if row.get("what") == "end"}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole rehearsal, with a Python that can import nothing beyond what a GPU's machine has."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('datasets', 'pandas', 'pyarrow', 'pydantic', 'sklearn', 'typer', 'trl', 'lm_eval'):\n"
        "    sys.modules[name] = None\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert subprocess.run([python, "-c", "import datasets"], capture_output=True).returncode != 0
    done = rehearse(folder / "out", python=python)
    log = folder / "out" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    yield folder / "out"


def test_every_part_ends_well_and_measures(rehearsal: Path) -> None:
    rows = rows_in(rehearsal)
    assert ends(rows) == dict.fromkeys(PARTS, 0)
    assert not [row for row in rows if "error" in row]
    measured = {part: [row for row in rows if row["part"] == part and "what" not in row] for part in PARTS}
    assert all(row["passed"] for row in measured["kernels"])
    assert len({(row["rank"], row["factors"], row["dropout"]) for row in measured["kernels"]}) >= 8
    ways = {part: {row["way"] for row in measured[part]} for part in PARTS[1:]}
    assert {"frozen", "PEFT LoRA r 14", "MSPLoRA r 8", "MSPLoRA r 8, compiled", "LoRA² r 8"} <= ways["steps"]
    assert {"frozen", "LoRA r 14, compiled", "Triton r 14"} <= ways["linear"]
    assert {"base", "PEFT LoRA r 8", "MSPLoRA r 8", "MSPLoRA r 8, merged"} <= ways["decode"]
    assert any("kernel" in row for row in measured["steps"]) and any("kernel" in row for row in measured["decode"])


def test_every_number_is_finite_and_ratios_are_to_the_first_way(rehearsal: Path) -> None:
    rows = rows_in(rehearsal)
    measured = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert len(measured) > 100
    assert all(math.isfinite(value) and value >= 0 for value in measured)
    assert {row["ratio"] for row in rows if row.get("way") in ("frozen", "base") and "ratio" in row} == {1.0}
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows if "ratio" in row)


def test_costs_of_a_step(rehearsal: Path) -> None:
    of = {row["way"]: row for row in rows_in(rehearsal) if "saved MiB" in row and "all linear" in row["table"]}
    assert of["frozen"]["trainable parameters"] == 0
    assert 0 < of["MSPLoRA r 8"]["trainable parameters"] < of["PEFT LoRA r 14"]["trainable parameters"]
    assert of["frozen"]["saved MiB"] < of["MSPLoRA r 8"]["saved MiB"]


def test_the_summary_shows_all_and_few_files_are_written(rehearsal: Path) -> None:
    text = (rehearsal / "summary.md").read_text(encoding="utf-8")
    for title in ("## Parts", "## Kernels against float64", "## Llama 1B", "## linear", "## decode", "## profile"):
        assert title in text
    assert re.search(r"torch \d.*transformers \d.*commit ", text)
    assert "### Failed" not in text
    tables = {row["table"] for row in rows_in(rehearsal) if "table" in row}
    assert all(f"## {table}\n" in text for table in tables)
    names = sorted(file.name for file in rehearsal.rglob("*"))
    assert names == ["log.txt", "results.jsonl", "summary.md"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def test_a_part_that_fails_or_is_cut_does_not_stop_the_next(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *gpu.steps*) exit 7 ;;\n"
        "  *gpu.decode*) sleep 60 ;;\n"
        """  *gpu.linear*) echo '{"part": "linear", "way": "after all"}' >>"$4/results.jsonl" ;;\n"""
        f'  *) exec "{sys.executable}" "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    done = rehearse(tmp_path / "out", "--parts", "steps decode linear", "--limit", "decode=1", python=python)
    assert done.returncode == 1
    rows = rows_in(tmp_path / "out")
    assert ends(rows) == {"steps": 7, "decode": 124, "linear": 0}
    assert any(row.get("way") == "after all" for row in rows)
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "| steps | with exit code 7 |" in text
    assert "| decode | cut at its limit |" in text
    assert "| linear | well |" in text


def test_wrong_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case whose result is off gets a row that says so; nothing is raised."""
    monkeypatch.syspath_prepend(str(ROOT))
    import torch
    from benchmarks.gpu import kernels

    from ziggurat.lowrank import plain_product

    def slightly_off(x, mask, As, dropout, dtype):
        return 1.01 * plain_product.down(x, mask, As, dropout, dtype)

    monkeypatch.setattr(kernels, "triton_product", SimpleNamespace(**{**vars(plain_product), "down": slightly_off}))
    case = kernels.Case(4, torch.float16, torch.float16, 0.0, 30, 40, 24)
    row = kernels.measured(case, torch.device("cpu"))
    assert not row["passed"] and row["out"] > row["allowed"] and "error" not in row


def test_a_process_that_a_case_ends_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import torch
    from benchmarks.gpu import kernels, rows

    def measured(case, device):
        return os._exit(9) if case.tokens == 2 else {"passed": True}

    monkeypatch.setattr(kernels, "measured", measured)
    share = [kernels.Case(4, torch.float16, torch.float16, 0.0, tokens, 8, 8) for tokens in (1, 2, 3)]
    kernels.run([share], 1, math.inf, torch.device("cpu"), rows.Rows(tmp_path, "kernels"))
    rows_by_tokens = {row["tokens"]: row for row in rows_in(tmp_path)}
    assert [rows_by_tokens[tokens]["passed"] for tokens in (1, 2, 3)] == [True, False, True]
    assert rows_by_tokens[2]["error"] == "its process ended with exit code 9"


def test_wheels_of_missing_and_of_old_packages_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from importlib.metadata import PackageNotFoundError

    from benchmarks.gpu import wheels

    installed = {"peft": "0.1", "transformers": "999.0", "pip": "0.1"}  # there is no bound for pip

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(wheels.metadata, "version", version)
    for name in ("peft", "transformers", "pip", "no_such_package"):
        (tmp_path / f"{name}-1.0-py3-none-any.whl").touch()
    assert [file.name.split("-")[0] for file in wheels.needed(tmp_path)] == ["no_such_package", "peft"]


def test_the_limits_sum_to_at_most_eight_minutes() -> None:
    limits = [int(seconds) for seconds in re.findall(r"\[\w+\]=(\d+)", SCRIPT.read_text(encoding="utf-8"))]
    assert len(limits) == len(PARTS) + 2
    assert sum(limits) + 5 * len(limits) <= 480


@pytest.mark.parametrize("words", [["--parts", "nothing"], ["--limit"], ["--unknown"]])
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path: Path, words: list[str]) -> None:
    done = rehearse(tmp_path / "out", *words)
    assert done.returncode == 2
    assert done.stderr
    assert not (tmp_path / "out").exists()
