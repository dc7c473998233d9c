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
            for bank, adapter in _staged(model):
                bank.set_stage(state.global_step / state.max_steps, adapter)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        for bank, adapter in _staged(model) if model is not None else ():
            bank.end_stages(adapter)


def _staged(model: nn.Module) -> list[tuple[Pyramid, str]]:
    """The adapters whose config asks for stages. The callback rides along in every Trainer, so most don't."""
    banks = [module for module in model.modules() if isinstance(module, Pyramid)]
    return [(bank, adapter) for bank in banks for adapter, wanted in bank.staged.items() if wanted]
