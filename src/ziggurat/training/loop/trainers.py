"""The Trainer of each task, set up from a recipe."""

from importlib import import_module

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ziggurat.host.bars import quiet
from ziggurat.recipe.tasks import REWARDED

from ..callbacks import trackers
from ..folder.workplace import LOGS
from .arguments import Setup, Task

#: Task -> module of this package and its function that makes the trainer; those of other tasks are in `scored`.
_TRAINERS = {
    "instruct": ("writing", "instructed"),
    **dict.fromkeys(("dpo", "kto", "orpo", "reward"), ("writing", "preferring")),
    **dict.fromkeys(REWARDED, ("sampling", "rewarding")),
    "distill": ("distill", "distilling"),
    "seq2seq": ("sequences", "transforming"),
}


def make_trainer(setup: Setup) -> Task:
    """The HF Trainer (or one of TRL's) of a recipe's task.

    Raises RecipeError for settings that this machine doesn't support, DataError for texts that don't fit the tokenizer.
    """
    with quiet():
        file, name = _TRAINERS.get(setup.recipe.task, ("scored", "scoring"))
        task: Task = getattr(import_module(f".{file}", __package__), name)(setup)
    trackers.write_into(task.trainer, setup.checkpoints.with_name(LOGS))
    for kind in (PrinterCallback, ProgressCallback):
        task.trainer.remove_callback(kind)
    return task
