"""The table of combinations in combinations.yaml, used by `ziggurat doctor` and docs/combinations.md."""

from dataclasses import dataclass, field
from importlib.resources import files

import yaml

METHODS = {"msplora": "MSPLoRA", "lora2": "LoRA²", "lor2c": "LoR2C"}
STATUS = ("yes", "limited", "no", "untested")
SECTIONS = {
    "base": "Base weights",
    "train": "Training",
    "distributed": "Several processes",
    "machine": "Where it runs",
    "use": "Using and serving",
}


@dataclass(frozen=True)
class Fact:
    """One row. `key` identifies it, `cells` has the status by method, `evidence` the tests that show it."""

    key: str
    section: str
    what: str
    cells: dict[str, str]
    why: str = ""
    instead: str = ""
    evidence: tuple[str, ...] = ()
    #: Method -> its own `why` and `instead`, if they differ from the row's.
    apart: dict[str, tuple[str, str]] = field(default_factory=dict)

    def reason(self, method: str) -> tuple[str, str]:
        """The reason of a method's cell, and the alternative."""
        return self.apart.get(method, (self.why, self.instead))


def _read() -> tuple[Fact, ...]:
    rows = yaml.safe_load((files("ziggurat") / "doctor" / "combinations.yaml").read_text(encoding="utf-8"))
    return tuple(
        Fact(
            **{
                **row,
                "cells": dict.fromkeys(METHODS, row["cells"]) if isinstance(row["cells"], str) else row["cells"],
                "evidence": tuple(row.get("evidence", ())),
                "apart": {method: tuple(reasons) for method, reasons in row.get("apart", {}).items()},
            }
        )
        for row in rows
    )


FACTS = _read()


def fact(key: str) -> Fact:
    """The row called `key`."""
    return next(row for row in FACTS if row.key == key)


def markdown() -> str:
    """The table of docs/combinations.md."""
    lines = []
    for section, title in SECTIONS.items():
        names = " | ".join(METHODS.values())
        lines += [f"| {title} | {names} | notes |", "|---|" + "---|" * (len(METHODS) + 1)]
        for row in FACTS:
            if row.section == section:
                cells = " | ".join(row.cells[method] for method in METHODS)
                reasons = {
                    "": (row.why, row.instead),
                    **{f"{METHODS[name]}: ": text for name, text in row.apart.items()},
                }
                about = ". ".join(
                    whose + "; otherwise: ".join(part for part in parts if part) for whose, parts in reasons.items()
                )
                lines.append(f"| {row.what} | {cells} | {about} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def written_into(page: str) -> str:
    """The page with the table between its marks `<!-- table -->` and `<!-- end -->`."""
    head, _, rest = page.partition("<!-- table -->\n")
    return f"{head}<!-- table -->\n{markdown()}<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    import sys
    from pathlib import Path

    path = Path(sys.argv[1])
    path.write_text(written_into(path.read_text(encoding="utf-8")), encoding="utf-8")
