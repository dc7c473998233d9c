"""The one file of values for a first recipe, `defaults.yaml`, and their reasons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from .schema import WRITES

#: The tasks that `ziggurat init` writes recipes for.
TASKS = ("classification", "multilabel", "regression", "tokens", "instruct", "dpo", "kto")


@dataclass(frozen=True)
class Proposal:
    """A model to start from, its size in millions of parameters, and what to know of it."""

    name: str
    millions: float
    about: str


def models_for(task: str) -> list[Proposal]:
    """Models for a task, the first to try first."""
    return [Proposal(*row) for row in _all()["encoder" if _scores(task) else "decoder"]["models"]]


def keys_for(task: str) -> dict[str, tuple[Any, str]]:
    """Key -> value and reason, for a task."""
    parts = ["encoder" if _scores(task) else "decoder", "preference" if task in ("dpo", "kto") else task]
    found: dict[str, tuple[Any, str]] = {}
    for part in parts:
        found |= {key: (value, why) for key, (value, why) in _all().get(part, {}).get("keys", {}).items()}
    return found


def _scores(task: str) -> bool:
    return task not in WRITES


@cache
def _all() -> dict[str, Any]:
    return yaml.safe_load((files("ziggurat") / "recipe" / "defaults.yaml").read_text(encoding="utf-8"))
