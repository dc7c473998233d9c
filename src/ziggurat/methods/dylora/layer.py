"""A linear with a low-rank update of which training uses a drawn number of leading directions."""

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ziggurat.host.bank import fresh_pair
from ziggurat.host.linear import AdaptedLinear
from ziggurat.lowrank.pair import FactorPair
from ziggurat.methods.dylora.config import DyLoRAConfig


class DyLoRALayer(BaseTunerLayer):
    """What marks a module as a tuner layer of DyLoRA."""


class DyLoRALinear(AdaptedLinear, DyLoRALayer):
    """A linear whose update is (alpha / b) B[:, :b] A[:b].

    `dylora_A` (r, d_in) and `dylora_B` (d_out, r), by adapter; `drawn`: b of the forward that is running in training.
    """

    dylora_A: nn.ParameterDict
    dylora_B: nn.ParameterDict

    method = "dylora"
    adapter_layer_names = ("dylora_A", "dylora_B")
    other_param_names = ("configs", "drawn")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: object) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.dylora_A, self.dylora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, DyLoRAConfig] = {}
        self.drawn: dict[str, int] = {}
        self._cut = False

    def add(self, adapter: str, config: DyLoRAConfig) -> None:
        """Give this linear the factors of `adapter`: A random, B zero (or as `init_weights` says)."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        drawn_on = "meta" if device is not None and device.type == "meta" else "cpu"
        A, B = fresh_pair(self.in_features, self.out_features, config.r, config.init_weights, drawn_on)
        self.dylora_A[adapter] = nn.Parameter(A.to(device=device, dtype=dtype))
        self.dylora_B[adapter] = nn.Parameter(B.to(device=device, dtype=dtype))
        self.configs[adapter] = config

    @property
    def adapters(self) -> Collection[str]:
        return self.configs

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Merging and export must never see a drawn rank, whatever mode the model is in.
        self._cut = self.training
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self._cut = False

    def effective_pair(self, adapter: str) -> FactorPair:
        config = self.configs[adapter]
        rank = self.drawn.get(adapter, config.r) if self._cut else config.kept_rank
        A, B = self.dylora_A[adapter][:rank], self.dylora_B[adapter][:, :rank]
        if self._cut and config.frozen:
            A = torch.cat([A[:-1].detach(), A[-1:]])
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1)
        return FactorPair(A, config.scale(rank) * B)

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        return self.dylora_A[adapter], self.dylora_B[adapter]

    def state_of(self, adapter: str) -> tuple[object, ...]:
        return self._cut, self.drawn.get(adapter), *super().state_of(adapter)

    def dropout(self, adapter: str) -> float:
        return self.configs[adapter].lora_dropout


def draw_ranks(model: nn.Module) -> None:
    """Draw one rank an adapter, the same for all linears of `model`, from torch's generator of the CPU."""
    ranks: dict[str, int] = {}
    for layer in model.modules():
        if isinstance(layer, DyLoRALinear):
            for adapter, config in layer.configs.items():
                if adapter not in ranks:
                    ranks[adapter] = int(torch.randint(config.min_rank, config.r + 1, ()))
                layer.drawn[adapter] = ranks[adapter]
