"""What several commands ask of an adapter's folder and of the folder they write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ziggurat.errors import ExportError

if TYPE_CHECKING:
    from ziggurat.training.answers.load import Loaded


def from_a_run(folder: Path) -> bool:
    """Whether the folder's own recipe says how to rebuild its model, head and label names included."""
    return (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file()


def adapter_of_a_run(folder: Path, base: str | None) -> Loaded | None:
    """What `ziggurat train` left in `folder`; None where another program wrote it, or `base` overrules its model.

    Raises:
        ExportError: the run trained the whole model: there is no adapter.
    """
    if base is not None or not from_a_run(folder):
        return None
    from ziggurat.training.answers.load import load_adapter_model

    loaded = load_adapter_model(folder)
    if not hasattr(loaded.model, "peft_config"):
        raise ExportError(f"'{folder}' holds a whole model, not an adapter: there is nothing to export or merge")
    return loaded


def refuse_taken(out: Path) -> None:
    """Raises ExportError when something stands at `out` already, an empty folder excepted."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"'{out}' exists already; name another folder")
