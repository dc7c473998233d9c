"""Checkpoints that are complete or ignored, even if the program is killed while it writes one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ziggurat.files.staging import sync_tree, write_whole

#: Lists the files of a checkpoint with their sizes. Written last, so a checkpoint without it is incomplete.
SEAL = "whole.json"


class Resumable:
    """Mixed into a Trainer class: a resumed run learns from the same batches as the uninterrupted one.

    Resumed from a checkpoint of its last step it takes no further step; transformers checks for the end only after a
    step.
    """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step < trainer.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return OrderOfEpoch(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler


class OrderOfEpoch(Sampler[int]):
    """A sampler that draws the order of an epoch from the seed and the epoch's number.

    `LengthGroupedSampler` draws from the global generator by default, whose state in the middle of an epoch, where a
    resumed run begins, differs from that at the epoch's start.
    """

    def __init__(self, sampler: LengthGroupedSampler, trainer: Any) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        self.sampler.generator = torch.Generator().manual_seed(self.trainer.args.seed + epoch)
        return iter(self.sampler)


class WholeCheckpoints(TrainerCallback):
    """Seals each checkpoint once it is synced to the disk, and only then deletes older ones.

    The Trainer writes file after file into the checkpoint's folder, then callbacks add theirs, so this callback comes
    last, and the Trainer must not delete checkpoints (`save_total_limit=None`).

    A checkpoint that is due at the last step of an epoch is written at the epoch's end, after the scoring there: that
    draws random numbers, and a run resumed from a checkpoint before it would continue with other ones than the
    uninterrupted run.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
        ended = state.epoch is not None and float(state.epoch).is_integer()
        self._due = control.should_save and ended
        control.should_save = control.should_save and not ended
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
        control.should_save = control.should_save or self._due
        self._due = False
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes the state of its random numbers
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        seal(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        rotate_checkpoints(str(folder), self.keep, best_model_checkpoint=state.best_model_checkpoint)


def seal(checkpoint: Path) -> None:
    """Mark the checkpoint as complete, once it is synced to the disk."""
    sync_tree(checkpoint)
    write_whole(checkpoint / SEAL, json.dumps(_sizes(checkpoint), indent=1))


def is_whole(checkpoint: Path) -> bool:
    """True if all files of the seal exist with the right sizes."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return isinstance(sizes, dict) and {name: (checkpoint / name).stat().st_size for name in sizes} == sizes
    except (OSError, ValueError):
        return False


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`."""
    checkpoints = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else []
    return max((checkpoint for checkpoint in checkpoints if is_whole(checkpoint)), key=step_of, default=None)


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
