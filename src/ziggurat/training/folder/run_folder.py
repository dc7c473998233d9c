"""The folder of a run: never overwritten silently, and complete when it appears."""

import json
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ziggurat.errors import RecipeError
from ziggurat.files.staging import told_of_storage, write_whole
from ziggurat.recipe.recipe import COMPUTATION, differences, effective, resolved, to_yaml
from ziggurat.recipe.run_files import RECIPE, RUN, UNFINISHED, is_run
from ziggurat.recipe.schema import Recipe

from ..data.content import contents
from ..devices.processes import Processes
from . import workplace
from .checkpoints import is_whole, newest
from .workplace import MAY_REPLACE

#: The way of launching of a run without a launcher, in run.json.
ONE = "1 process"


class RunFolder:
    """`output` appears whole at the end of a run; until then all files are in `output.unfinished` beside it.

    Of several processes only rank 0 reads and writes; its result, or its error, is broadcast to all.
    """

    def __init__(self, recipe: Recipe, processes: Processes | None = None) -> None:
        self.recipe = recipe
        self.processes = processes or Processes()
        self.final = Path(recipe.folder).expanduser().resolve()
        self.work = self.final.with_name(self.final.name + UNFINISHED)
        self.checkpoints = self.work / workplace.CHECKPOINTS
        self.lock = workplace.Lock(self.work)

    def check(self) -> None:
        """Check, before anything is loaded, that no earlier run's work is lost.

        A finished result that a killed run has not moved to its place is moved first.

        Raises:
            RecipeError: the place is taken, can't be written to, or another program is training into it.
            StorageError: a finished result can't be put in its place.
        """
        self.processes.first(self._check)

    def _check(self) -> None:
        shown = self.recipe.folder
        self._check_parent()
        self.settle()
        if self.recipe.overwrite:
            for folder in (self.final, self.work):
                if folder.exists() and not is_run(folder):
                    raise RecipeError(
                        f"output: '{folder}' was not written by a run (it has no {RUN}), "
                        "so overwrite=true doesn't touch it; choose another output=..."
                    )
        elif self.recipe.resume:
            self._check_resume(shown)
        elif workplace.filled(self.final):
            finished = " a finished run" if is_run(self.final) else " something else"
            raise RecipeError(
                f"output: '{shown}' holds{finished} already. Choose another output=..."
                + (", or replace it with overwrite=true" if is_run(self.final) else "")
            )
        elif self.work.exists():
            step = self.last_checkpoint()
            content = f"an interrupted run, last checkpoint {step.name}" if step else "a run without checkpoint"
            go_on = "Go on with resume=true, s" if step else "S"
            raise RecipeError(
                f"output: '{shown}.unfinished' holds {content}. {go_on}tart afresh with overwrite=true, "
                "or choose another output=..."
            )

    def _check_parent(self) -> None:
        parent = self.final.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RecipeError(f"output: '{parent}' is not a folder that can be written to; choose another output=...")
        with told_of_storage(self.final):
            try:
                tempfile.TemporaryDirectory(dir=parent, prefix=f".{self.final.name}.").cleanup()
            except FileNotFoundError as error:  # as in /proc
                raise RecipeError(f"output: no folder can be made in '{parent}'; choose another output=...") from error

    def _check_resume(self, shown: str) -> None:
        if self.last_checkpoint() is None:
            if is_run(self.final):
                raise RecipeError(
                    f"resume: the run in '{shown}' is finished. To train again use overwrite=true or another output=..."
                )
            raise RecipeError(f"resume: there is no checkpoint under '{shown}.unfinished'; start without resume=true")
        if workplace.filled(self.final) and not self._may_replace(self.final):
            raise RecipeError(
                f"output: '{shown}' was filled by something else since the run began; move that away, and resume then"
            )
        changed = differences(effective(self._stored_recipe()), effective(resolved(self.recipe)))
        noted = self.noted()
        changed += differences({"launched": noted.get("launched", ONE)}, {"launched": launched(self.processes)})
        if noted.get("computation") != COMPUTATION:
            changed.append("it was begun by a version that computes differently")
        content = noted.get("content", {})
        changed += [
            f"{key}: the files that it names have changed since the run began"
            for key in content
            if content[key] != self._content.get(key)
        ]
        if changed:
            raise RecipeError(
                "resume: the recipe differs from the interrupted run's:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nGive the same recipe and files, launched in the same way, or start afresh with overwrite=true"
            )

    @cached_property
    def _content(self) -> dict[str, str]:
        return contents(self.recipe)

    def _stored_recipe(self) -> dict[str, Any]:
        try:
            return yaml.safe_load((self.work / RECIPE).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise RecipeError(
                f"resume: {self.work / RECIPE} cannot be read ({error}); start afresh with overwrite=true"
            ) from error

    def open(self) -> dict[str, Any]:
        """Make the working folder. Returns the notes of an interrupted run, or an empty mapping."""
        return self.processes.first(self._open)

    def _open(self) -> dict[str, Any]:
        if self.recipe.resume:
            self._take_lock()
            self._drop_broken()
            return self.noted()
        if self.lock.is_taken():
            raise self._in_use_error()
        workplace.discard(self.work)
        files = {RECIPE: to_yaml(self.recipe), RUN: self._as_json({})}
        workplace.make(self.work, files | ({MAY_REPLACE: ""} if workplace.filled(self.final) else {}))
        self._take_lock()
        return {}

    def _take_lock(self) -> None:
        if not self.lock.take():
            raise self._in_use_error()

    def _in_use_error(self) -> RecipeError:
        return RecipeError(
            f"output: another program is training into '{self.recipe.folder}'; wait for it, or choose another output"
        )

    def _drop_broken(self) -> None:
        """Delete incomplete checkpoints, left by a killed program or a full disk."""
        for folder in self.checkpoints.iterdir() if self.checkpoints.is_dir() else []:
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def noted(self) -> dict[str, Any]:
        try:
            return json.loads((self.work / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def note(self, run: dict[str, Any], folder: Path | None = None) -> None:
        """Write run.json atomically, with the way of launching and the digests of the run's files."""
        if not self.processes.main:
            return
        write_whole((folder or self.work) / RUN, self._as_json(run))

    def _as_json(self, run: dict[str, Any]) -> str:
        made = {"launched": launched(self.processes), "computation": COMPUTATION, "content": self._content}
        return json.dumps({**run, **made}, indent=2, ensure_ascii=False) + "\n"

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return newest(self.checkpoints)

    def publish(self, ready: Path) -> None:
        """Move the complete folder `ready`, made by `workplace.new_result`, to `output`.

        Raises:
            RecipeError: something else has filled it meanwhile; the result stays beside it.
            StorageError: the disk is full, read-only or forbidden.
        """
        workplace.finish(self.work, ready)
        self.settle()

    def settle(self) -> None:
        """Move a finished result to its place, and clean up after a program that was killed at that point.

        Raises:
            RecipeError: something else has filled the place, or another program is at work there.
            StorageError: the disk is full, read-only or forbidden.
        """
        if self.lock.is_taken():
            raise self._in_use_error()
        workplace.settle(self.work, self.final, self._may_replace)

    def _may_replace(self, place: Path) -> bool:
        return is_run(place) and (self.recipe.overwrite or (self.work / MAY_REPLACE).exists())

    def abandon(self) -> None:
        """After an error: delete the working folder, unless it holds a checkpoint or a finished result."""
        if not (self.processes.main and self.lock.held):
            return
        workplace.release(self.work)
        self._drop_broken()
        worth_keeping = self.last_checkpoint() is not None or (self.work / workplace.DONE).exists()
        if not (worth_keeping or self.recipe.resume):
            workplace.discard(self.work)


def launched(processes: Processes) -> str:
    """The number of processes and their way of training: a checkpoint fits only the same ones."""
    return ONE if processes.way == "one" else f"{processes.size} processes, {processes.way}"
