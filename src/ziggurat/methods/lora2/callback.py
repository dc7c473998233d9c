"""LoRA²'s part of a Trainer besides pruning: the regulariser in every loss and in the logs, the final ranks."""

import logging
import sys
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from ziggurat.host.base.unwrap import unwrap
from ziggurat.methods.lora2.pruning import adapted, learning_adapters
from ziggurat.methods.lora2.ranks import table
from ziggurat.methods.lora2.regulariser import deviation, hook_of, learning_linear_layers, penalty

logger = logging.getLogger(__name__)


class LoRA2Callback(TrainerCallback):
    """Regularises the LoRA² adapters that train. Every Trainer gets one; it does nothing for other models."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the regulariser's gradient if the step's loss was not the model's own.

        Label smoothing, loss functions and TRL's trainers make the loss from the model's other outputs.
        The gradient is the same on every process, and comes after gradients were averaged and clipped.
        """
        hook = hook_of(model)
        if hook is None:
            return
        joined, hook.joined = hook.joined, False
        if joined:
            return
        with torch.enable_grad():
            added = penalty(model)
        if added is None or not added.requires_grad:
            return
        _unscale(optimizer)
        linear_layers = learning_linear_layers(model).items()
        factors = [factor for adapter, layers in linear_layers for layer in layers for factor in layer.planes(adapter)]
        for factor, gradient in zip(factors, torch.autograd.grad(added, factors, allow_unused=True), strict=True):
            if gradient is not None and factor.grad is not None:
                factor.grad.add_(gradient)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """From the final mask on, exclude earlier checkpoints, which hold more directions than the target, from the
        choice of the best model."""
        for adapter, config in learning_adapters(model).items():
            last = config.schedule(state.max_steps).last if config.prunes else 0
            if state.global_step + 1 == last:
                if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    logger.warning(
                        "the mask of adapter %r is final from step %d on; the best model is chosen from here on, since "
                        "earlier checkpoints hold more than target_rank=%d directions a linear layer",
                        *(adapter, last, config.target),
                    )
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, logs: Any = None, **kwargs: Any
    ) -> None:
        """Put `orthogonality`, the deviation without its weight, beside the training loss."""
        if logs is None or "loss" not in logs or not learning_adapters(model):
            return
        with torch.no_grad():
            logs["orthogonality"] = float(deviation(model))
        # The history holds a copy, made before callbacks are called.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["orthogonality"] = logs["orthogonality"]

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Print the numbers of surviving directions, one row a layer, one column a role."""
        for adapter, config in learning_adapters(model).items():
            layers = adapted(model, adapter)
            ranks = {path: int(layer.alive(adapter).sum()) for path, layer in layers.items()}
            if not state.is_world_process_zero:
                continue
            last = config.schedule(state.max_steps).last if config.prunes else 0
            if state.global_step < last:
                logger.warning(
                    "training ended at step %d, before the mask of adapter %r is final (step %d): it holds more than "
                    "target_rank=%d directions a linear layer",
                    *(state.global_step, adapter, last, config.target),
                )
            if not any(ranks.values()):
                logger.warning(
                    "after step %d every direction of adapter %r still has E = 0: it changes nothing. Train longer, or "
                    "at a higher rate",
                    *(state.global_step, adapter),
                )
            elif any(adapter in layer.masks for layer in layers.values()):
                shown = table(unwrap(model)[0], ranks)
                sys.stderr.write(f"remaining directions of the adapter {adapter!r}:\n{shown}\n")


def _unscale(optimizer: Any) -> None:
    """Undo loss scaling (fp16) of the gradients, if clipping hasn't done it yet."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        try:
            scaler.unscale_(optimizer.optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
