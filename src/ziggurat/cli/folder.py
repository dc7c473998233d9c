"""Checks that several commands share, of an adapter's folder and of the folder that they write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ziggurat.errors import ExportError
from ziggurat.terminal import say

if TYPE_CHECKING:
    from ziggurat.training.answers.load import Loaded


def adapter_of_a_run(folder: Path, base: str | None) -> Loaded | None:
    """The model and tokenizer of a run of `ziggurat train`; None if another program wrote `folder`, or `base` is given.

    Raises:
        ExportError: the run trained the whole model: there is no adapter.
    """
    from ziggurat.recipe.run_files import is_run

    if base is not None or not is_run(folder):
        return None
    from ziggurat.training.answers.load import load_adapter_model

    loaded = load_adapter_model(folder)
    if not hasattr(loaded.model, "peft_config"):
        raise ExportError(f"'{folder}' holds a whole model, not an adapter: there is nothing to export or merge")
    return loaded


def refuse_taken(out: Path) -> None:
    """Raises ExportError if `out` exists already and isn't an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"'{out}' exists already; name another folder")


def check_hub(repo: str | None) -> None:
    """Check the login if `--push-to-hub` names a repository. Raises ExportError."""
    if repo is not None:
        from ziggurat.export.push import check

        check(repo)


def push(folder: Path, repo: str | None, private: bool) -> None:
    """Upload a folder if `--push-to-hub` names a repository. Raises ExportError."""
    if repo is not None:
        from ziggurat.export.push import push as upload

        say(f"uploaded to {upload(folder, repo, private=private)}")
