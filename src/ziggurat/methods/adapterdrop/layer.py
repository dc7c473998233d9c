"""A linear with a bottleneck behind it."""

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from ziggurat.errors import ExportError
from ziggurat.host.linear import AdaptedLinear
from ziggurat.lowrank.pair import FactorPair, init_kaiming_
from ziggurat.methods.adapterdrop.config import AdapterDropConfig

_CANNOT = (
    "a bottleneck adapter isn't linear, so no weight and no plain LoRA can hold it: keep the adapter beside its model."
)


class AdapterDropLayer(BaseTunerLayer):
    """What marks a module as a tuner layer of bottleneck adapters."""


class BottleneckLinear(AdaptedLinear, AdapterDropLayer):
    """y = W x + U f(D dropout(W x) + a) + c.

    By adapter: `adapterdrop_down` D (r, d_out), `adapterdrop_up` U (d_out, r), `adapterdrop_down_bias` a (r),
    `adapterdrop_up_bias` c (d_out). `depth`: the number of the layer this linear lies in; `dropped`: adapters of layers
    below this number are left out, `drawn` the same for the forward that is running in training.
    """

    adapterdrop_down: nn.ParameterDict
    adapterdrop_up: nn.ParameterDict
    adapterdrop_down_bias: nn.ParameterDict
    adapterdrop_up_bias: nn.ParameterDict

    method = "adapterdrop"
    adapter_layer_names = ("adapterdrop_down", "adapterdrop_up", "adapterdrop_down_bias", "adapterdrop_up_bias")
    other_param_names = ("configs", "depth", "dropped", "drawn")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: object) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, AdapterDropConfig] = {}
        self.depth: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.drawn: dict[str, int] = {}

    def add(self, adapter: str, config: AdapterDropConfig, depth: int) -> None:
        """Give this linear, in layer `depth`, the bottleneck of `adapter`; U = 0 unless `init_weights` is False."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        drawn_on = "meta" if device is not None and device.type == "meta" else "cpu"
        down = init_kaiming_(torch.empty(config.r, self.out_features, device=drawn_on))
        up = torch.zeros(self.out_features, config.r, device=drawn_on)
        if config.init_weights is False:
            init_kaiming_(up)
        biases = torch.zeros(config.r, device=drawn_on), torch.zeros(self.out_features, device=drawn_on)
        for name, tensor in zip(self.adapter_layer_names, (down, up, *biases), strict=True):
            getattr(self, name)[adapter] = nn.Parameter(tensor.to(device=device, dtype=dtype))
        self.configs[adapter], self.depth[adapter], self.dropped[adapter] = config, depth, 0

    @property
    def adapters(self) -> Collection[str]:
        return self.configs

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._add_by_sample(y, x, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.configs and not self._left_out(adapter):
                y = y + self._bottleneck(y, adapter)
        return y

    def _bottleneck(self, y: Tensor, adapter: str) -> Tensor:
        down, up, a, c = (getattr(self, name)[adapter] for name in self.adapter_layer_names)
        config = self.configs[adapter]
        h = functional.dropout(y.to(down.dtype), config.lora_dropout, self.training)
        h = getattr(functional, config.activation)(functional.linear(h, down, a))
        return functional.linear(h, up, c).to(y.dtype)

    def _left_out(self, adapter: str) -> bool:
        dropped = self.drawn.get(adapter, 0) if self.training else 0
        return self.depth[adapter] < max(dropped, self.dropped[adapter])

    def _add_by_sample(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} names for a batch of {len(x)}: give one name a sample."
            )
        y = y.clone()
        for adapter in sorted(set(adapter_names) & set(self.configs)):
            if not self._left_out(adapter):
                rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=y.device)
                y[rows] = y[rows] + self._bottleneck(y[rows], adapter)
        return y

    def dropout(self, adapter: str) -> float:
        return self.configs[adapter].lora_dropout

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        raise ExportError(f"adapter {adapter!r}: {_CANNOT}")

    def effective_pair(self, adapter: str) -> FactorPair:
        raise ExportError(f"adapter {adapter!r}: {_CANNOT}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_CANNOT)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def draw_depths(model: nn.Module) -> None:
    """Draw for each robust adapter how many of the lowest layers are left out, from torch's generator of the CPU."""
    depths: dict[str, int] = {}
    for layer in model.modules():
        if isinstance(layer, BottleneckLinear):
            for adapter, config in layer.configs.items():
                if config.robust_drop:
                    if adapter not in depths:
                        depths[adapter] = int(torch.randint(0, config.robust_drop + 1, ()))
                    layer.drawn[adapter] = depths[adapter]
