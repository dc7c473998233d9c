"""A hook before every forward of a whole model, for methods that draw something anew for each."""

from collections.abc import Callable
from typing import Any

from torch import nn


class TrainingDraw:
    """A forward pre-hook on the base model's root: calls `draw(model)` before each forward in training.

    All layers then see the same draw, also when gradient checkpointing runs them again. `draw`
    is a module-level function, so that a model with the hook can be copied and pickled.
    """

    def __init__(self, draw: Callable[[nn.Module], None]) -> None:
        self.draw = draw

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self.draw(model)


def hook_into(model: nn.Module, draw: Callable[[nn.Module], None]) -> None:
    """Have `draw` called before each forward of `model` in training, once however often this is asked."""
    if not any(isinstance(hook, TrainingDraw) and hook.draw is draw for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(TrainingDraw(draw))


def unhook(model: nn.Module, draw: Callable[[nn.Module], None]) -> None:
    """Undo `hook_into`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, TrainingDraw) and hook.draw is draw:
            del model._forward_pre_hooks[key]
