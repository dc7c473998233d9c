"""The values of a first recipe with their reasons, from `defaults.yaml`."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from .tasks import TASKS, Task

#: The tasks that `ziggurat init` writes recipes for; rewards can't be inferred from a file.
STARTS = tuple(name for name, task in TASKS.items() if task.rows != "prompts")
#: transformers' name of a task's models -> the part of the file with proposals.
_KINDS = {
    "SequenceClassification": "encoder",
    "TokenClassification": "encoder",
    "CausalLM": "decoder",
    "Seq2SeqLM": "encoder_decoder",
}


@dataclass(frozen=True)
class Proposal:
    """A model to start from, its size in millions of parameters, and a description."""

    name: str
    millions: float
    about: str


def models_for(task: str, images: bool = False) -> list[Proposal]:
    """Models for a task (that see `images`), the first to try first."""
    return [Proposal(*row) for row in _all()["seeing" if images else _part(TASKS[task])]["models"]]


def keys_for(task: str, images: bool = False) -> dict[str, tuple[Any, str]]:
    """Key -> value and reason, for a task."""
    row = TASKS[task]
    keys: dict[str, tuple[Any, str]] = {}
    parts = [_part(row), "preference" if row.rows in ("pairs", "judged") and row.writes else task]
    for part in [*parts, "seeing"] if images else parts:
        keys |= {key: (value, why) for key, (value, why) in _all().get(part, {}).get("keys", {}).items()}
    return keys


def _part(task: Task) -> str:
    """The part of the file that proposes models: pairs of answers are rated by decoders."""
    return "decoder" if task.rows == "pairs" else _KINDS[task.model]


@cache
def _all() -> dict[str, Any]:
    return yaml.safe_load((files("ziggurat") / "recipe" / "defaults.yaml").read_text(encoding="utf-8"))
