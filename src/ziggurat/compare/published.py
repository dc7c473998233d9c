"""Published figures, printed beside measured ones and marked as such."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml

PublishedName = Literal["roberta-glue", "llama2-alpaca"]


@dataclass(frozen=True)
class Figure:
    """One row of a published table. `method` is the name in a recipe, `scores` are by task."""

    method: str
    label: str
    parameters: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Published:
    """A published table: its paper, its model, and a note on its scores."""

    source: str
    model: str
    note: str
    columns: list[str]
    rows: list[Figure]


@cache
def published(name: str) -> Published:
    """The published table called `name`, a `PublishedName`."""
    text = (files("ziggurat") / "compare" / "published.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)[name]
    rows = [
        Figure(method, label, parameters, dict(zip(values["columns"], scores, strict=True)))
        for method, label, parameters, *scores in values["rows"]
    ]
    return Published(values["source"], values["model"], values["note"], values["columns"], rows)
