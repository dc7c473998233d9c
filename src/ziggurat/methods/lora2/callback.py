"""What a Trainer does for LoRA² by itself: pruning, the regulariser's number in the logs, resuming."""

import base64
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ziggurat.host.unwrap import unwrap
from ziggurat.methods.lora2.pruning import adapted, learning_adapters, load_pruning_state, prune, pruning_state
from ziggurat.methods.lora2.ranks import table
from ziggurat.methods.lora2.regulariser import deviation, hook_of, learning_linear_layers, penalty

logger = logging.getLogger(__name__)

#: Where the pruning's state stands in a checkpoint's trainer_state.json, among the callbacks' states.
STATE_KEY = "ziggurat.lora2"


class LoRA2Callback(TrainerCallback):
    """Prunes the LoRA² adapters that train. Rides along in every Trainer; does nothing for other models."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the schedule against the length of the run; take up the averages and masks of a resumed one."""
        adapters = learning_adapters(model) if isinstance(model, nn.Module) else {}
        for adapter, config in adapters.items():
            config.schedule(state.max_steps)
            if not state.global_step:
                for layer in adapted(model, adapter).values():
                    layer.begin(adapter)
        if not adapters or not state.global_step:
            return
        saved = _states(state).get(STATE_KEY)
        if saved is None:
            logger.warning(
                "resuming at step %d from a checkpoint without the averages that LoRA² prunes by: they start anew",
                state.global_step,
            )
        else:
            load_pruning_state(model, load(base64.b64decode(saved["state"])))

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Where the step's loss was not the model's own, add the regulariser's gradient here.

        Label smoothing, loss functions and TRL's trainers make the loss from the model's other outputs.
        The gradient is the same on every process, and comes after gradients were averaged and clipped.
        """
        hook = hook_of(model) if isinstance(model, nn.Module) else None
        if model is None or hook is None:
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
        """Rank and prune: gradients are summed, averaged over processes, unscaled and clipped now, and still there.

        The checkpoints of before the final mask hold more directions than the target: from that mask on they no longer
        compete for the best model.
        """
        step = state.global_step + 1
        for adapter, config in learning_adapters(model).items() if isinstance(model, nn.Module) else ():
            prune(model, step, state.max_steps, adapter)
            if config.target < config.r and step == config.schedule(state.max_steps).last:
                if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    logger.warning(
                        "the mask of adapter %r is final from step %d on; the best model is chosen from here on, since "
                        "earlier checkpoints hold more than target_rank=%d directions a linear",
                        *(adapter, step, config.target),
                    )
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, logs: Any = None, **kwargs: Any
    ) -> None:
        """Put `orthogonality`, the deviation without its weight, beside the training loss."""
        if not isinstance(model, nn.Module) or logs is None or "loss" not in logs or not learning_adapters(model):
            return
        with torch.no_grad():
            logs["orthogonality"] = float(deviation(model))
        # The history has a copy of its own, made before callbacks are asked.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["orthogonality"] = logs["orthogonality"]

    def on_save(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write averages and masks into the checkpoint's trainer_state.json, from where the Trainer reads them back.

        Trainer doesn't hand a callback the folder that a run resumes from, but the state that it read there.
        """
        if not isinstance(model, nn.Module) or not learning_adapters(model) or not (tensors := pruning_state(model)):
            return
        _states(state)[STATE_KEY] = {
            "format": "safetensors, base64",
            "state": base64.b64encode(save(tensors)).decode(),
        }
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            state.save_to_json(str(folder / "trainer_state.json"))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Show where the directions that survived are, one row a layer, one column a role."""
        if not isinstance(model, nn.Module):
            return
        for adapter, config in learning_adapters(model).items():
            layers = adapted(model, adapter)
            ranks = {path: int(layer.alive(adapter).sum()) for path, layer in layers.items()}
            if not state.is_world_process_zero:
                continue
            last = config.schedule(state.max_steps).last
            if config.target < config.r and state.global_step < last:
                logger.warning(
                    "training ended at step %d, before the mask of adapter %r is final (step %d): it holds more than "
                    "target_rank=%d directions a linear",
                    *(state.global_step, adapter, last, config.target),
                )
            if any(adapter in layer.kept for layer in layers.values()):
                shown = table(unwrap(model)[0], ranks)
                sys.stderr.write(f"directions left of the adapter {adapter!r}:\n{shown}\n")


def _states(state: TrainerState) -> dict[str, Any]:
    """The callbacks' states by name; a state that was made from a list of callbacks turns it into this dict."""
    assert isinstance(state.stateful_callbacks, dict)
    return state.stateful_callbacks


def _unscale(optimizer: Any) -> None:
    """Bring the gradients back from loss scaling (fp16), if clipping hasn't done it yet."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        try:
            scaler.unscale_(optimizer.optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
