"""Lightning: one callback calls `ziggurat.step`, and keeps the state of a resumed run.

    Trainer(callbacks=[ZigguratCallback()])

The adapted model may be any attribute of the LightningModule. Lightning writes the checkpoints: its `state_dict` holds
the weights and the structure, this callback's state the rest.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.extras import require
from ziggurat.host.lifecycle import check_something_trains, resume, run_state, step
from ziggurat.host.method_layer import MethodLayer

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]
else:
    # Lightning has two package names: the one that is loaded already is taken, else either.
    _names = sorted(("lightning", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    _name = next((name for name in _names if find_spec(name) is not None), None)
    _module = {"lightning": "lightning.pytorch"}.get(_name, _name)
    Callback = object if _module is None else import_module(_module).Callback


class ZigguratCallback(Callback):
    """Calls `ziggurat.step` before the first optimiser step and after each one.

    Raises:
        ConfigError: a run without an end, which stages and schedules need; several optimisers.
    """

    def __init__(self) -> None:
        if Callback is object:
            require("ZigguratCallback", "lightning")
        self._model: nn.Module | None = None
        self._state: dict[str, Any] | None = None
        self._done = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = adapted(pl_module)
        self._done = trainer.global_step
        check_something_trains(self._model)
        if self._done:
            resume(self._model, self._state or {}, self._done, _total(trainer), trainer.optimizers[0])
        else:
            step(self._model, 0, _total(trainer), trainer.optimizers[0])
        self._state = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the optimiser's step, if this batch ended one: Lightning clears gradients in the next batch."""
        if self._model is not None and trainer.global_step > self._done:
            self._done = trainer.global_step
            step(self._model, self._done, _total(trainer), trainer.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        return {"run_state": run_state(self._model)} if self._model is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict.get("run_state")


def adapted(module: nn.Module) -> nn.Module:
    """The outermost module in `module` with ziggurat adapters: the model that was given to PEFT.

    Raises:
        ConfigError: there is none, or there are several.
    """
    models = [
        child
        for child in module.modules()
        if hasattr(child, "peft_config") and any(isinstance(inner, MethodLayer) for inner in child.modules())
    ]
    inside = {id(inner) for outer in models for inner in outer.modules() if inner is not outer}
    outermost = [model for model in models if id(model) not in inside]
    if len(outermost) != 1:
        raise ConfigError(
            f"{type(module).__name__} holds {len(outermost)} models with adapters of ziggurat, and ZigguratCallback "
            "serves one: make it by get_peft_model, and keep it as an attribute of the LightningModule."
        )
    return outermost[0]


def _total(trainer: Trainer) -> int:
    if len(trainer.optimizers) != 1:
        raise ConfigError(f"{len(trainer.optimizers)} optimisers: ZigguratCallback counts the steps of one.")
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ConfigError("this run has no end, by which stages and pruning are laid out: give max_steps, or epochs.")
    return int(total)
