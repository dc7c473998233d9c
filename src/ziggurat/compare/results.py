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
        advice = "The finished run is in its folder; make room, and the same command notes it."
        with told_of_storage(self.path, advice), self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["key"]] = line

    def of(self, table: Table) -> list[dict[str, Any]]:
        """The finished lines of a table's runs, with the table's present labels."""
        return self._of(table, "done")

    def failed(self, table: Table) -> list[dict[str, Any]]:
        """The lines of a table's failed runs, each run once, with the table's present labels."""
        return list({line["key"]: line for line in self._of(table, "failed")[::-1]}.values())[::-1]

    def _of(self, table: Table, status: str) -> list[dict[str, Any]]:
        return [
            {**self.lines[run.key], "method": run.method, "task": run.task, "seed": run.seed}
            for run in table.runs
            if self.lines.get(run.key, {}).get("status") == status
        ]


def line_of(run: Run, info: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The line of a finished run from its worker's result, and its surroundings `where`.

    Scores are those of the weights that were saved; a base model that nothing trained has only `evaluated` ones.
    """
    copied = ("before", "after", "guess", "parameters", "steps", "seconds", "step_seconds", "peak_mb", "stored_bytes")
    values = {
        "metric": info["metric"],
        "score": info["after"][info["metric"]] if run.trains else None,
        **{name: info.get(name) for name in copied},
        **({"evaluated": info["evaluated"]} if "evaluated" in info else {}),
        "notes": info.get("notes", []),
        "warnings": info.get("warnings", []),
        "versions": info["versions"],
    }
    return _line(run, "done", values, where)


def failed_line(run: Run, error: str, log: str | None, where: dict[str, Any]) -> dict[str, Any]:
    """The line of a failed run: the reason in one line, the path of its log, and its surroundings as far as known."""
    return _line(run, "failed", {"error": error, "log": log}, where)


def _line(run: Run, status: str, values: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    place = {"key": run.key, "method": run.method, "task": run.task, "seed": run.seed}
    recipe = {"recipe": computed(run.recipe)}
    evaluation = {"evaluation": asdict(run.evaluation)} if run.evaluation is not None else {}
    return {**place, "status": status, **values, **recipe, **evaluation, **where}
