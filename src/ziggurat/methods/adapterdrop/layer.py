"""A linear layer with a bottleneck after it (bottleneck adapters, arXiv 1902.00751; AdapterDrop, arXiv 2010.11918).

y = W x + U f(D dropout(W x) + a) + c. It is not a factor pair, since f is not linear, and so has its own forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ziggurat.errors import ExportError
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method import EVALUATION, Context
from ziggurat.host.method_layer import rows_by_adapter
from ziggurat.host.site import Site
from ziggurat.host.tensors import TensorSpec, kaiming, zeros
from ziggurat.lowrank.pair import FactorPair
from ziggurat.methods.adapterdrop.config import AdapterDropConfig

_CANNOT = (
    "a bottleneck adapter isn't linear, so no weight and no plain LoRA can hold it: keep the adapter beside its model."
)


def tensors(config: AdapterDropConfig, site: Site) -> dict[str, TensorSpec]:
    """D (r, d_out), U (d_out, r), a (r), c (d_out); U = 0 unless `init_weights` is False. Nothing in dropped layers."""
    if site.layer < config.drop_layers:
        return {}
    return {
        "down": TensorSpec((config.r, site.d_out), kaiming),
        "up": TensorSpec((site.d_out, config.r), kaiming if config.init_weights is False else zeros),
        "down_bias": TensorSpec((config.r,), zeros),
        "up_bias": TensorSpec((site.d_out,), zeros),
    }


def draw(config: AdapterDropConfig) -> int:
    """How many of the lowest layers a robust adapter leaves out in this pass, uniform from 0 to `robust_drop`."""
    return int(torch.randint(0, config.robust_drop + 1, ())) if config.robust_drop else 0


class BottleneckLinear(AdaptedLinear):
    """`dropped`: adapters of layers below this number are skipped permanently; `robust_drop` draws a number for each
    pass."""

    other_param_names = ("dropped",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropped: dict[str, int] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._add_by_sample(y, x, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.adapters and not self._left_out(adapter):
                y = y + self._bottleneck(y, adapter)
        return y

    def _bottleneck(self, y: Tensor, adapter: str) -> Tensor:
        t, config = self.stored(adapter), self.configs[adapter]
        h = functional.dropout(y.to(t["down"].dtype), config.lora_dropout, self.training)
        h = getattr(functional, config.activation)(functional.linear(h, t["down"], t["down_bias"]))
        return functional.linear(h, t["up"], t["up_bias"]).to(y.dtype)

    def _left_out(self, adapter: str) -> bool:
        drawn = self.context(adapter).drawn or 0
        return self.sites[adapter].layer < max(drawn, self.dropped.get(adapter, 0))

    def _add_by_sample(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        y = y.clone()
        for adapter, rows in rows_by_adapter(adapter_names, len(x), self.adapters, y.device):
            if not self._left_out(adapter):
                y[rows] = y[rows] + self._bottleneck(y[rows], adapter)
        return y

    def pair_of(self, adapter: str, tensors: dict[str, Tensor], context: Context = EVALUATION) -> FactorPair:
        raise ExportError(f"adapter {adapter!r}: {_CANNOT}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_CANNOT)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
