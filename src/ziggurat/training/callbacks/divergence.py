"""A NaN or infinite loss ends the run: earlier checkpoints stay, and the error says where and why."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ziggurat.errors import DivergedError


class StopAtNaN(TrainerCallback):
    """Stops a Trainer at the first loss or weight that is NaN or infinite, before a checkpoint is written with it.

    The losses of a step's batches are checked after the step, and the trained weights before a checkpoint, since a step
    with a finite loss can spoil them. It must come after all callbacks that ask for checkpoints. The Trainer's own
    filter, which hides such losses (`logging_nan_inf_filter`), is switched off.

    Args:
        last_checkpoint: returns the folder of the newest checkpoint, or None.
    """

    def __init__(self, last_checkpoint: Callable[[], Path | None]) -> None:
        self._last_checkpoint = last_checkpoint
        self._losses: list[Tensor] = []
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.logging_nan_inf_filter = False
        model: nn.Module = kwargs["model"]
        self._losses.clear()
        self._handle = model.register_forward_hook(self._keep_loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the losses of the micro-batches of this step, in one transfer from the device.

        Raises:
            DivergedError: one of them isn't finite, or a checkpoint is due and a trained weight isn't.
        """
        losses, self._losses = self._losses, []
        if losses:
            values = torch.stack([loss.float() for loss in losses]).tolist()
            bad = next((loss for loss in values if not math.isfinite(loss)), None)
            if bad is not None:
                raise self._error(args, state, f"the loss is {bad}")
        if control.should_save:
            self._check_weights(args, state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._check_weights(args, state, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A Trainer that computes its loss outside the model exposes it only here.
        loss = (kwargs.get("logs") or {}).get("loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            raise self._error(args, state, f"the loss is {loss}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._check_weights(args, state, kwargs["model"])

    def close(self) -> None:
        """Remove the hook from the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _keep_loss(self, model: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else None
        if model.training and isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def _check_weights(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter.detach()).all():
                raise self._error(args, state, f"{name} has values that are NaN or infinite")

    def _error(self, args: TrainingArguments, state: TrainerState, problem: str) -> DivergedError:
        self.close()
        checkpoint = self._last_checkpoint()
        return DivergedError(
            f"step {state.global_step} of {state.max_steps}: {problem}, so training stopped. "
            f"{_resume_advice(checkpoint)} {_hint(args)}"
        )


def _resume_advice(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "There is no earlier checkpoint."
    return (
        f"The last good checkpoint is in {checkpoint}: resume=true goes on from there with the same recipe; after a "
        "change to it, overwrite=true starts afresh."
    )


def _hint(args: TrainingArguments) -> str:
    """The most frequent remedies of a NaN loss, for these settings."""
    parts = []
    if args.fp16:
        parts.append("set train.precision to bf16 or fp32, since fp16 overflows above 65,504")
    parts.append(f"lower train.lr (now {args.learning_rate:g})")
    if not args.max_grad_norm:
        parts.append("clip gradients by train.max_grad_norm=1.0")
    parts.append("or look for damaged weights in the base model and for NaN in the data")
    return f"Remedies: {', '.join(parts)}."
