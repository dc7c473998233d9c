"""Training the tiers one after the other, coarse to fine, in equal shares of the run."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ziggurat.host.bank import Bank
from ziggurat.host.method_layer import MethodLayer
from ziggurat.methods.msplora.config import MSPLoraConfig
from ziggurat.methods.msplora.model import stage
from ziggurat.methods.msplora.pyramid import tier_of


class StageCallback(TrainerCallback):
    """Trains the adapters whose config says `train_in_stages` tier by tier. Rides along in every Trainer.

    It takes the gradients of the other tiers away before each optimiser step and leaves no mark on the model, so a run
    that ends in an exception leaves nothing to undo.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, nn.Module) and state.max_steps > 0:
            for tensor in waiting(model, state.global_step / state.max_steps):
                tensor.grad = None


def waiting(model: nn.Module, progress: float) -> Iterator[Tensor]:
    """The tensors of the tiers that don't learn at `progress` (0 to 1) of a run, of all adapters in stages."""
    banks = {id(m): m for m in model.modules() if isinstance(m, Bank) and m.method.config is MSPLoraConfig}
    for bank in banks.values():
        for adapter in bank.stores:
            config = _config(model, adapter)
            if config is None or not config.train_in_stages:
                continue
            learning = stage(config.stages, progress)
            factors = bank.factors(adapter)
            yield from (factors[leaf] for leaf in factors.names() if tier_of(leaf) != learning)


def _config(model: nn.Module, adapter: str) -> MSPLoraConfig | None:
    layers = (m for m in model.modules() if isinstance(m, MethodLayer) and m.method.config is MSPLoraConfig)
    return next((layer.configs[adapter] for layer in layers if adapter in layer.configs), None)
