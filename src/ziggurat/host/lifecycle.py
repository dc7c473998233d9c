"""The lifecycle of adapters that train, called once a step in any loop: stages, pruning and restructuring."""

import logging
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ziggurat.host.base.unwrap import unwrap, without_wrappers
from ziggurat.host.method import Method, needs_steps
from ziggurat.host.method_layer import layers_of
from ziggurat.host.root_hook import RootHook
from ziggurat.host.values import check_step

logger = logging.getLogger(__name__)

#: Forward passes in training without a call of `step` before one warning.
PATIENCE = 96


#: An update whose outputs are smaller than this, for inputs of size 1, is nearly zero: LoRA has thirty times as much
#: after ten steps at a rate of 1e-5.
NEARLY_ZERO = 1e-5

#: Names of methods whose `step` a Trainer calls for them.
STEPPED: set[str] = set()


def step(
    model: nn.Module, step: int, total: int, optimizer: Optimizer | None = None, *, only: Collection[str] | None = None
) -> None:
    """Update the adapters of `model` when `step` of a run's `total` optimiser steps are done.

    To be called before the first step with 0, and after every `optimizer.step()`, before the gradients are cleared,
    with 1, 2, ... `total`. Tiers that train in stages change, directions are ranked and pruned by the gradients that
    are there, paths merge and inject. With the optimiser, a path that moves to another layer takes its moments along.
    Frozen adapters, and those that need no steps, stay as they are. A transformers Trainer calls this itself. `only`:
    names of methods; the others are skipped.

    Raises:
        ConfigError: a step outside 0..total, or a run too short for an adapter's schedule.
    """
    check_step(step, total)
    root = _root(model)
    for method, adapters in _stepping(root, only).items():
        for adapter, config in adapters.items():
            if method.step is not None:
                method.step(root, adapter, config, step, total, optimizer)
    Watch.reset(root)


def run_state(model: nn.Module, *, only: Collection[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """The state that a resumed run needs besides the weights, by method: the averages and masks of pruning.

    `only`: as in `step`.
    """
    root = _root(model)
    states = {m.name: m.run_state(root) for m in _stepping(root, only) if m.run_state is not None}
    return {name: state for name, state in states.items() if state}


def resume(
    model: nn.Module,
    state: Mapping[str, Mapping[str, Tensor]],
    done: int,
    total: int,
    optimizer: Optimizer | None = None,
    *,
    only: Collection[str] | None = None,
) -> None:
    """Resume a run after `done` of `total` steps, instead of `step(model, 0, total)`.

    `state`: the result of `run_state` at that step. The model must have the weights and the structure of that step.
    `only`: as in `step`.

    Raises:
        ConfigError: it was saved from another model or config.
    """
    root = _root(model)
    for method in _stepping(root, only):
        if method.resume is None:
            step(model, done, total, optimizer, only=(method.name,))
        elif method.name in state:
            method.resume(root, state[method.name])
        else:
            logger.warning(
                "resuming at step %d of %d without the training state of %s, which starts anew from its weights",
                *(done, total, method.card.shown),
            )


def _stepping(root: nn.Module, only: Collection[str] | None) -> dict[Method, dict[str, Any]]:
    """Method -> adapter -> config, of the adapters that train and need steps; methods limited to `only`."""
    chosen = {m: adapters for m, adapters in _adapters(root).items() if only is None or m.name in only}
    needing = {m: {name: c for name, c in adapters.items() if needs_steps(c)} for m, adapters in chosen.items()}
    return {m: adapters for m, adapters in needing.items() if adapters}


def _root(model: nn.Module) -> nn.Module:
    """The base model inside wrappers for training and inside PEFT's."""
    return unwrap(without_wrappers(model))[0]


def _adapters(root: nn.Module) -> dict[Method, dict[str, Any]]:
    """Method -> adapter -> config, of the adapters that train."""
    training: dict[Method, dict[str, Any]] = {}
    for layer in layers_of(root):
        for adapter in layer.training_adapters():
            training.setdefault(layer.method, {}).setdefault(adapter, layer.configs[adapter])
    return training


class Watch(RootHook):
    """A forward pre-hook on the base model's root: warns once if an adapter needs `step` and training doesn't call
    it."""

    #: Forward passes in training since the last step.
    passes = 0

    def put_on(self, root: nn.Module) -> None:
        root.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not model.training:
            return
        self.passes += 1
        if self.passes != PATIENCE:
            return
        for method, adapters in _adapters(model).items():
            for adapter, config in adapters.items():
                if needs_steps(config):
                    logger.warning(
                        "%d training passes without a call of ziggurat.step(model, step, total): adapter %r of %s "
                        "stays as it is, though its config asks for changes during training. Call it after "
                        "optimizer.step(), or train with a transformers Trainer, which does it by itself.",
                        *(PATIENCE, adapter, method.card.shown),
                    )

    @staticmethod
    def reset(model: Any) -> None:
        """Restart the count: a step was made."""
        if isinstance(model, nn.Module) and (watch := Watch.on(_root(model))) is not None:
            watch.passes = 0


def check_something_trains(model: Any) -> None:
    """Warn if a training run begins on a model whose ziggurat adapters are all frozen."""
    if not isinstance(model, nn.Module):
        return
    layers = list(layers_of(_root(model)))
    if layers and not any(layer.training_adapters() for layer in layers):
        names = sorted({f"{name!r} ({layer.method.card.shown})" for layer in layers for name in layer.leaves})
        logger.warning(
            "training begins, but no parameter of the adapter %s trains: it was loaded frozen. Load it with "
            "is_trainable=True, or call model.set_adapter(name).",
            ", ".join(names),
        )


@torch.no_grad()
def check_moves(model: Any, when: str, rate: float) -> None:
    """Warn if the whole update of an adapter that trains is still nearly zero when its warm-up is over (`when`).

    The size of an update dW is ||dW||_F / sqrt(d_out), the root of the mean square of its outputs where the inputs are
    independent with mean square 1. Skipped where FSDP2 shards the tensors.
    """
    if not isinstance(model, nn.Module):
        return
    sizes: dict[tuple[str, str], list[Tensor]] = {}
    for layer in layers_of(_root(model)):
        able = layer.method.pair is not None
        for adapter in set(layer.training_adapters()) & set(layer.adapters) if able else ():
            A, B = (half.detach().float() for half in layer.effective_pair(adapter))
            if hasattr(A, "full_tensor") or hasattr(B, "full_tensor"):
                return
            square = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0) / B.shape[-2]
            sizes.setdefault((adapter, layer.method.card.shown), []).append(square.max().sqrt().cpu())
    for (adapter, shown), of_sites in sizes.items():
        size = float(torch.stack(of_sites).max())
        if size < NEARLY_ZERO:
            logger.warning(
                "%s, the update of adapter %r (%s) is still nearly zero: for inputs of size 1 its outputs have size "
                "%.1g at most. It hardly learns. Raise the learning rate (now %g), or choose another init_weights "
                "where the method has one that starts faster.",
                *(when, adapter, shown, size, rate),
            )


def add_to_trainers(callback: type[Any]) -> None:
    """Give each Trainer made from now on (TRL's are Trainers too) one `callback()`; a second call adds no second one.

    A tuner calls this when it adds an adapter that needs the callback, before the Trainer is made: transformers'
    Trainer starts from a list of default callbacks, which this extends. The callback must do nothing for models without
    its method.
    """
    from transformers import trainer

    defaults: list[type[Any]] = trainer.DEFAULT_CALLBACKS
    if callback not in defaults:
        defaults.append(callback)


def watch_trainers() -> None:
    """Add `TrainingWatch` to every Trainer made from now on, if this process has loaded Trainer."""
    if "transformers.trainer" in sys.modules:
        from ziggurat.host.watching import TrainingWatch

        add_to_trainers(TrainingWatch)


def step_in_trainers(method: Method) -> None:
    """Make every Trainer created from now on call `step` for the adapters of `method`. Loads Trainer."""
    from ziggurat.host.watching import StepCallback

    STEPPED.add(method.name)
    add_to_trainers(StepCallback)
