"""Training the tiers one after the other, coarse to fine, in equal shares of the run."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from ziggurat.host.bank import Bank
from ziggurat.methods.msplora.config import MSPLoraConfig
from ziggurat.methods.msplora.model import waiting


class StageCallback(TrainerCallback):
    """Trains the adapters whose config says `train_in_stages` tier by tier. Every Trainer gets one.

    It takes the gradients of the other tiers away before each optimiser step and leaves no mark on the model, so a run
    that ends in an exception leaves nothing to undo.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for bank in model.modules() if isinstance(model, nn.Module) and state.max_steps > 0 else ():
            if isinstance(bank, Bank) and bank.method.config is MSPLoraConfig:
                for adapter, config in bank.configs.items():
                    if config.train_in_stages:
                        factors, progress = bank.factors(adapter), state.global_step / state.max_steps
                        for leaf in waiting(bank, adapter, config.stages, progress):
                            factors[leaf].grad = None
