"""MSPLoRA's tuner layers: the shared pairs, and a linear that reads its three."""

from collections.abc import Collection, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ziggurat.host.bank import Component, PairBank
from ziggurat.host.linear import AdaptedLinear
from ziggurat.lowrank.pair import FactorPair
from ziggurat.methods.msplora.pyramid import Tier, tier_of


class MSPLoraLayer(BaseTunerLayer):
    """What marks a module as a tuner layer of MSPLoRA."""


class Pyramid(PairBank, MSPLoraLayer):
    """The pairs of all tiers of all roles and stacks, adapter by adapter."""

    adapter_layer_names = ("msplora_factors",)
    other_param_names = ("tiers", "staged")

    def __init__(self) -> None:
        super().__init__()
        self.tiers: dict[str, tuple[Tier, ...]] = {}
        self.staged: dict[str, bool] = {}

    def set_stage(self, progress: float, adapter: str = "default") -> str:
        """Let one tier of `adapter` learn, the one in whose share of the run `progress` (0 to 1) lies; its name.

        The tiers take equal shares, coarse to fine.
        """
        tiers = self.tiers[adapter]
        learning = tiers[min(int(progress * len(tiers)), len(tiers) - 1)].name
        names = self.factors(adapter).names()
        self.hold_still(adapter, [name for name in names if tier_of(name) != learning])
        return learning

    def end_stages(self, adapter: str = "default") -> None:
        """Let all tiers of `adapter` learn again."""
        self.hold_still(adapter, ())

    def __repr__(self) -> str:
        return f"msplora.{super().__repr__()}"


class MSPLoraLinear(AdaptedLinear, MSPLoraLayer):
    """A linear whose update is the sum of one pair of each tier."""

    method = "msplora"
    other_param_names = ("components", "lora_dropout")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: object) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.components: dict[str, tuple[Component, ...]] = {}
        self.lora_dropout: dict[str, float] = {}

    def join(self, adapter: str, bank: Pyramid, components: Sequence[Component], dropout: float) -> None:
        """Let `adapter`'s update here be made of `components` of `bank`."""
        # Past nn.Module.__setattr__, so that the bank is registered at the root alone.
        object.__setattr__(self, "_bank", bank)
        self.components[adapter] = tuple(components)
        self.lora_dropout[adapter] = dropout

    @property
    def adapters(self) -> Collection[str]:
        return self.components

    def effective_pair(self, adapter: str) -> FactorPair:
        bank: Pyramid = self.__dict__["_bank"]
        return bank(adapter, self.components[adapter])

    def tensors(self, adapter: str) -> list[Tensor]:
        factors = self.__dict__["_bank"].factors(adapter)
        return [half for component in self.components[adapter] for half in factors.pair(component.pair)]

    def dropout(self, adapter: str) -> float:
        return self.lora_dropout[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        home = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name in self.components and home is not None:
            self.__dict__["_bank"].move_from_cpu(adapter_name, self.components[adapter_name], home)
