"""The inputs of a trainer, the trainer of a task, and a recipe's settings as fields of TrainingArguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ziggurat.errors import RecipeError
from ziggurat.recipe.schema import Recipe

from ..callbacks.rising import EVERY
from ..data.examples import Examples
from ..model.base import Base
from . import metrics


@dataclass(frozen=True)
class Setup:
    """The inputs of a trainer of any task; `rewards` by name, for tasks that learn from them."""

    recipe: Recipe
    base: Base
    model: nn.Module
    examples: Examples
    checkpoints: Path
    callbacks: list[TrainerCallback]
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields of TrainingArguments; see `training_arguments`."""
        return training_arguments(self.recipe, self.checkpoints)

    @property
    def multiple(self) -> int | None:
        """Batches are padded to a multiple of this length, which tensor cores want."""
        return 8 if self.recipe.train.precision != "fp32" else None

    def trainer(self, kind: Any, arguments: TrainingArguments, rows: Sequence[Any], **more: Any) -> Any:
        """A trainer of class `kind`, with `rows` to learn from and to score; `more` are its further arguments."""
        train, validation = rows
        data = {"train_dataset": train, "eval_dataset": validation}
        trainer = kind(model=self.model, args=arguments, **data, callbacks=self.callbacks, **more)
        if "ref" in getattr(trainer.model, "peft_config", {}):
            # TRL keeps a copy of the adapter to compute a reference, which isn't needed from here on.
            trainer.model.delete_adapter("ref")
        return trainer


@dataclass(frozen=True)
class Task:
    """A trainer ready to start, and the scores of the majority-class or mean baseline.

    `by_class` returns `classes.by_class` of the last scoring of the validation rows; empty for other tasks. `alike`
    returns the warning of a model that gives them all the same answer there; None otherwise.
    """

    trainer: Trainer
    notes: list[str]
    guess: dict[str, float] = field(default_factory=dict)
    by_class: Callable[[], dict[str, Any]] = dict
    alike: Callable[[], str | None] = lambda: None


def training_arguments(recipe: Recipe, checkpoints: Path) -> dict[str, Any]:
    """The fields of TrainingArguments. Raises RecipeError for a precision that this machine doesn't have."""
    from ziggurat.host.older import checkpointing_argument

    train = recipe.train
    if train.precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError("train.precision: fp16 needs an accelerator, this machine has none; use fp32 or bf16")
    if train.precision == "bf16" and torch.accelerator.is_available() and not is_torch_bf16_gpu_available():
        raise RecipeError("train.precision: this machine's accelerator does not compute in bf16; use fp32 or fp16")
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch,
        "per_device_eval_batch_size": train.eval_batch,
        "gradient_accumulation_steps": train.accumulate,
        "learning_rate": train.lr,
        "weight_decay": train.weight_decay,
        **({"optim": train.optimizer} if train.optimizer is not None else {}),
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.warmup,
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "use_cpu": not torch.accelerator.is_available(),  # without this transformers refuses bf16 there
        checkpointing_argument(): train.gradient_checkpointing,
        "train_sampling_strategy": "group_by_length" if train.group_by_length else "random",
        "load_best_model_at_end": train.best,
        "metric_for_best_model": recipe.main_metric if train.best else None,
        "greater_is_better": not metrics.lower_is_better(recipe.main_metric) if train.best else None,
        "dataloader_num_workers": train.workers,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "seed": recipe.seed,
        "report_to": list(train.report_to or []),
        "run_name": recipe.name,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": EVERY,
        "logging_first_step": True,
    }
    for key, every in (("eval", train.evaluate), ("save", train.save)):
        if every == "epoch" and recipe.data.streaming:  # a fifth of the run: the epochs of a stream aren't known
            every = max(1, (train.max_steps or 1) // 5)
        if isinstance(every, int):
            arguments |= {f"{key}_strategy": "steps", f"{key}_steps": every}
        else:
            arguments[f"{key}_strategy"] = {"epoch": "epoch", "never": "no"}[every]
    return arguments
