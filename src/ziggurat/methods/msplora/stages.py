"""Training the tiers one after the other, coarse to fine, in equal shares of the run."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ziggurat.methods.msplora.layer import Pyramid


class StageCallback(TrainerCallback):
    """Moves the adapters whose config says `train_in_stages` from tier to tier. Rides along in every Trainer."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None and state.max_steps > 0:
            for bank in _banks(model):
                for adapter in bank.staged:
                    bank.set_stage(state.global_step / state.max_steps, adapter)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        for bank in _banks(model) if model is not None else ():
            for adapter in bank.staged:
                bank.end_stages(adapter)


def _banks(model: nn.Module) -> list[Pyramid]:
    return [module for module in model.modules() if isinstance(module, Pyramid)]
