"""The folder of a run: never overwritten in silence, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from ziggurat.errors import RecipeError

from .processes import Processes
from .recipe import differences, resolved, to_yaml
from .schema import Recipe

RECIPE, RUN = "recipe.yaml", "run.json"
#: How a run without a launcher was launched.
ONE = "1 process"


class RunFolder:
    """`output` appears whole at the end of a run; until then all lies in `output.unfinished` beside it.

    Of several processes the main one alone looks and writes; what it finds, or its error, goes to all.
    """

    def __init__(self, recipe: Recipe, processes: Processes | None = None) -> None:
        self.recipe = recipe
        self.processes = processes or Processes()
        self.final = Path(recipe.folder).expanduser().resolve()
        self.work = self.final.with_name(self.final.name + ".unfinished")
        self.checkpoints = self.work / "checkpoints"

    def check(self) -> None:
        """Refuse, before anything is loaded, what would lose an earlier run's work. Raises RecipeError."""
        self.processes.first(self._check)

    def _check(self) -> None:
        shown = self.recipe.folder
        if self.recipe.overwrite:
            for folder in (self.final, self.work):
                if folder.exists() and not _ours(folder):
                    raise RecipeError(
                        f"output: '{folder}' was not written by a run (it has no {RUN}), "
                        "so overwrite=true doesn't touch it; choose another output=..."
                    )
        elif self.recipe.resume:
            self._check_resume(shown)
        elif self.final.exists() and (not self.final.is_dir() or any(self.final.iterdir())):
            finished = " a finished run" if _ours(self.final) else " something else"
            raise RecipeError(
                f"output: '{shown}' holds{finished} already. Choose another output=..."
                + (", or replace it with overwrite=true" if _ours(self.final) else "")
            )
        elif self.work.exists():
            step = self.last_checkpoint()
            left = f"an interrupted run, last checkpoint {step.name}" if step else "what a run without checkpoint left"
            go_on = "Go on with resume=true, s" if step else "S"
            raise RecipeError(
                f"output: '{shown}.unfinished' holds {left}. {go_on}tart afresh with overwrite=true, "
                "or choose another output=..."
            )
        parent = self.final.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RecipeError(f"output: '{parent}' is not a folder that can be written to; choose another output=...")

    def _check_resume(self, shown: str) -> None:
        if self.last_checkpoint() is None:
            if _ours(self.final):
                raise RecipeError(
                    f"resume: the run in '{shown}' is finished. To train again use overwrite=true or another output=..."
                )
            raise RecipeError(f"resume: there is no checkpoint under '{shown}.unfinished'; start without resume=true")
        changed = differences(self._stored_recipe(), resolved(self.recipe))
        changed = [line for line in changed if line.split(":")[0] not in ("about", "output", "name")]
        changed += differences({"launched": self._noted().get("launched", ONE)}, {"launched": self._launched()})
        if changed:
            raise RecipeError(
                "resume: the recipe differs from the interrupted run's:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nGive the same recipe, launched in the same way, or start afresh with overwrite=true"
            )

    def _stored_recipe(self) -> dict[str, Any]:
        try:
            return yaml.safe_load((self.work / RECIPE).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise RecipeError(
                f"resume: {self.work / RECIPE} cannot be read ({error}); start afresh with overwrite=true"
            ) from error

    def open(self) -> dict[str, Any]:
        """Make the working folder. Returns what an interrupted run noted, or an empty mapping."""
        return self.processes.first(self._open)

    def _open(self) -> dict[str, Any]:
        if self.recipe.resume:
            return self._noted()
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        (self.work / RECIPE).write_text(to_yaml(self.recipe), encoding="utf-8")
        self.note({})
        return {}

    def _noted(self) -> dict[str, Any]:
        try:
            return json.loads((self.work / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _launched(self) -> str:
        return launched(self.processes)

    def note(self, run: dict[str, Any], folder: Path | None = None) -> None:
        """Write run.json whole or not at all, with how the run was launched."""
        if not self.processes.main:
            return
        run = {**run, "launched": self._launched()}
        target = (folder or self.work) / RUN
        beside = target.with_suffix(".tmp")
        beside.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, target)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: Trainer writes its state file last."""
        found = []
        for folder in self.checkpoints.glob("checkpoint-*") if self.checkpoints.is_dir() else []:
            step = folder.name.rpartition("-")[2]
            if step.isdigit() and (folder / "trainer_state.json").is_file():
                found.append((int(step), folder))
        return max(found)[1] if found else None

    def publish(self, ready: Path) -> None:
        """Put the complete folder `ready` (inside the working folder) in the place of `output`."""
        if self.final.exists() and any(self.final.iterdir()):
            if not (self.recipe.overwrite and _ours(self.final)):
                raise RecipeError(
                    f"output: '{self.recipe.folder}' was filled by something else meanwhile; "
                    f"the result lies in '{ready}'"
                )
            old = self.work / "replaced"
            os.replace(self.final, old)
        elif self.final.exists():
            self.final.rmdir()
        os.replace(ready, self.final)
        shutil.rmtree(self.work, ignore_errors=True)

    def abandon(self) -> None:
        """After an error: leave nothing behind unless there is a checkpoint worth keeping."""
        if self.processes.main and self.work.exists() and self.last_checkpoint() is None and not self.recipe.resume:
            shutil.rmtree(self.work, ignore_errors=True)


def launched(processes: Processes) -> str:
    """How many processes, trained in which way: a checkpoint fits only the same."""
    return ONE if processes.way == "one" else f"{processes.size} processes, {processes.way}"


def _ours(folder: Path) -> bool:
    return (folder / RUN).is_file() and (folder / RECIPE).is_file()
