"""Results as JSON lines: what each run gave, and on what."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from ziggurat.host.staging import told_of_storage
from ziggurat.training.recipe import resolved

from .table import Run, Table

FILE = "results.jsonl"


class Results:
    """The lines of `results.jsonl`, the newest of each key. Only a finished run counts as done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.lines: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # the last line of a program that was killed while it wrote
                self.lines[line["key"]] = line

    def done(self, key: str) -> bool:
        return self.lines.get(key, {}).get("status") == "done"

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, whole and on the disk before this returns. Raises StorageError if the disk doesn't take it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        left = "The finished run lies in its folder; make room, and the same command notes it."
        with told_of_storage(self.path, left), self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["key"]] = line

    def of(self, table: Table) -> list[dict[str, Any]]:
        """The finished lines of a table's runs, under the labels that the table now gives them."""
        found = []
        for run in table.runs:
            if self.done(run.key):
                found.append({**self.lines[run.key], "method": run.method, "task": run.task, "seed": run.seed})
        return found


def line_of(run: Run, info: dict[str, Any]) -> dict[str, Any]:
    """The line of a finished run from its run.json. Scores are those of the weights that were saved."""
    kept = ("before", "after", "guess", "parameters", "steps", "seconds", "step_seconds", "peak_mb", "stored_bytes")
    return {
        **_place(run),
        "status": "done",
        "metric": info["metric"],
        "score": info["after"][info["metric"]],
        **{name: info.get(name) for name in kept},
        "notes": info.get("notes", []),
        "recipe": resolved(run.recipe),
        "versions": info["versions"],
        **surroundings(),
    }


def failed_line(run: Run, error: str, log: str | None) -> dict[str, Any]:
    """The line of a run that failed: why in one line, and where its output lies."""
    return {
        **_place(run),
        "status": "failed",
        "error": error,
        "log": log,
        "recipe": resolved(run.recipe),
        **surroundings(),
    }


def _place(run: Run) -> dict[str, Any]:
    return {"key": run.key, "method": run.method, "task": run.task, "seed": run.seed}


def surroundings() -> dict[str, Any]:
    """When, on what hardware, and by which commit of this package (where it is a git checkout)."""
    return {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(), "commit": commit()}


@cache
def commit() -> str | None:
    """The commit of the checkout this package runs from, with `+changes` where files differ; None if installed."""
    here = str(Path(__file__).parent)

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", here, *words],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        inside = git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", ".") else "") or inside
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, and the accelerators that this process may use."""
    import torch

    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
