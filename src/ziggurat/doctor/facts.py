"""The table of combinations in combinations.yaml, used by `ziggurat doctor` and docs/combinations.md."""

from dataclasses import dataclass, field
from importlib.resources import files

import yaml

METHODS = {"msplora": "MSPLoRA", "lora2": "LoRA²", "lor2c": "LoR2C"}


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
