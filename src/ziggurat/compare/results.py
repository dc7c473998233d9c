"""Results as JSON lines: each run's scores and surroundings."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ziggurat.files.staging import told_of_storage

from .table import Run, Table, computed

FILE = "results.jsonl"


class Results:
    """The lines of `results.jsonl`, the newest of each key. Only a finished run counts as done.

    `shard`, such as "2-of-8": lines are appended to a separate file, since programs on several machines can't append to
    one file safely. All files are read.
    """

    def __init__(self, folder: Path, shard: str = "") -> None:
        self.path = folder / (f"results.{shard}.jsonl" if shard else FILE)
        self.lines: dict[str, dict[str, Any]] = {}
        # If a run failed in one file and finished in another, the finished line counts.
        for path in sorted({*folder.glob("results.*-of-*.jsonl"), folder / FILE}):
            for text in path.read_bytes().split(b"\n") if path.is_file() else ():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # an incomplete line of a killed program, possibly cut within a character
                if not self.done(line["key"]) or line["status"] == "done":
                    self.lines[line["key"]] = line

    def done(self, key: str) -> bool:
        return self.lines.get(key, {}).get("status") == "done"

    def add(self, line: dict[str, Any]) -> None:
        """Append a line and sync it to the disk. Raises StorageError if it can't be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        left = "The finished run is in its folder; make room, and the same command notes it."
        with told_of_storage(self.path, left), self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["key"]] = line

    def of(self, table: Table) -> list[dict[str, Any]]:
        """The finished lines of a table's runs, with the table's present labels."""
        lines = []
        for run in table.runs:
            if self.done(run.key):
                lines.append({**self.lines[run.key], "method": run.method, "task": run.task, "seed": run.seed})
        return lines

    def failed(self, table: Table) -> list[dict[str, Any]]:
        """The lines of a table's failed runs, each run once, with the table's present labels."""
        lines: dict[str, dict[str, Any]] = {}
        for run in table.runs:
            line = self.lines.get(run.key, {})
            if line.get("status") == "failed":
                lines.setdefault(run.key, {**line, "method": run.method, "task": run.task, "seed": run.seed})
        return list(lines.values())


def line_of(run: Run, info: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The line of a finished run from its worker's result, and its surroundings `where`.

    Scores are those of the weights that were saved; a base model that nothing trained has only `evaluated` ones.
    """
    kept = ("before", "after", "guess", "parameters", "steps", "seconds", "step_seconds", "peak_mb", "stored_bytes")
    return {
        **_place(run),
        "status": "done",
        "metric": info["metric"],
        "score": info["after"][info["metric"]] if run.trains else None,
        **{name: info.get(name) for name in kept},
        **({"evaluated": info["evaluated"]} if "evaluated" in info else {}),
        "notes": info.get("notes", []),
        "recipe": computed(run.recipe),
        **_evaluation(run),
        "versions": info["versions"],
        **where,
    }


def failed_line(run: Run, error: str, log: str | None, where: dict[str, Any]) -> dict[str, Any]:
    """The line of a failed run: the reason in one line, the path of its log, and its surroundings as far as known."""
    return {
        **_place(run),
        "status": "failed",
        "error": error,
        "log": log,
        "recipe": computed(run.recipe),
        **_evaluation(run),
        **where,
    }


def _evaluation(run: Run) -> dict[str, Any]:
    return {"evaluation": asdict(run.evaluation)} if run.evaluation is not None else {}


def _place(run: Run) -> dict[str, Any]:
    return {"key": run.key, "method": run.method, "task": run.task, "seed": run.seed}
