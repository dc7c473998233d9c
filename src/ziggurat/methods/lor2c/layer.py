"""LoR2C's tuner layers: the path at a layer, and the linear that takes over when a path is given up."""

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ziggurat.host.bank import PairBank, fresh_pair
from ziggurat.host.handover import Handover
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.paths import PathLayer
from ziggurat.lowrank.pair import FactorPair, stack


class LoR2CLayer(BaseTunerLayer):
    """What marks a module as a tuner layer of LoR2C."""


class SharedDown(PairBank):
    """The A (r, d) that all layers of a stack share, adapter by adapter and stack by stack; owned once at the root."""

    def create_down(
        self, adapter: str, name: str, d: int, rank: int, init: bool | str, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Add the A called `name` to `adapter` unless it is there."""
        factors = self.factors(adapter)
        if name not in factors._parameters:
            drawn = fresh_pair(d, 1, rank, init, "meta" if device.type == "meta" else "cpu").A
            factors.register_parameter(name, nn.Parameter(drawn.to(device=device, dtype=dtype)))

    def forward(self, adapter: str, name: str) -> torch.Tensor:  # type: ignore[override]
        """The A called `name`, (r, d)."""
        shared = self.factors(adapter)._parameters[name]
        assert shared is not None
        return shared


class LoR2CPath(PathLayer, LoR2CLayer):
    """The paths that end at one layer. Factors `lor2c_A` (r, d), absent where A is shared, and `lor2c_B` (d, r)."""

    adapter_layer_names = ("lor2c_A", "lor2c_B")
    other_param_names = ("covers", "scale", "lora_dropout", "shared")

    def __init__(self, layer: int, handover: Handover, width: int) -> None:
        super().__init__(layer, handover)
        self.in_features = self.out_features = width
        self.lor2c_A = nn.ParameterDict()
        self.lor2c_B = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        #: Adapter -> the name of its shared A.
        self.shared: dict[str, str] = {}

    def join(self, adapter: str, scale: float, dropout: float, device: torch.device, dtype: torch.dtype) -> None:
        """Let `adapter` have paths that pass or end here."""
        self.scale[adapter], self.lora_dropout[adapter] = scale, dropout
        self.covers[adapter] = None
        self._home = (device, dtype)

    def own(self, adapter: str, d: int, rank: int, init: bool | str) -> None:
        """Give `adapter` a pair here: A random and B zero, or as `init` says."""
        pair = self._fresh(d, rank, init)
        self.lor2c_A[adapter], self.lor2c_B[adapter] = nn.Parameter(pair.A), nn.Parameter(pair.B)

    def own_up(self, adapter: str, d: int, rank: int, init: bool | str, bank: SharedDown, name: str) -> None:
        """Give `adapter` a B here, beside the shared A called `name` in `bank`."""
        # Past nn.Module.__setattr__, so that the bank is registered at the root alone.
        object.__setattr__(self, "_bank", bank)
        self.shared[adapter] = name
        bank.create_down(adapter, name, d, rank, init, *self._home)
        self.lor2c_B[adapter] = nn.Parameter(self._fresh(d, rank, init).B)

    def _fresh(self, d: int, rank: int, init: bool | str) -> FactorPair:
        device, dtype = self._home
        pair = fresh_pair(d, d, rank, init, "meta" if device.type == "meta" else "cpu")
        return FactorPair(pair.A.to(device=device, dtype=dtype), pair.B.to(device=device, dtype=dtype))

    def raw_pair(self, adapter: str) -> FactorPair:
        """A and B without the scale."""
        name = self.shared.get(adapter)
        down = self.lor2c_A[adapter] if name is None else self.__dict__["_bank"](adapter, name)
        return FactorPair(down, self.lor2c_B[adapter])

    def own_factors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters that belong to this layer's path alone, by "A" and "B"."""
        halves = {"A": self.lor2c_A, "B": self.lor2c_B}
        return {name: half[adapter] for name, half in halves.items() if adapter in half}  # type: ignore[misc]

    def effective_pair(self, adapter: str) -> FactorPair:
        return stack([self.raw_pair(adapter)], [self.scale[adapter]])

    def dropout(self, adapter: str) -> float:
        return self.lora_dropout[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        home = device or self._home[0]
        for half in (self.lor2c_A, self.lor2c_B):
            if adapter_name in half and home.type != "meta":
                half[adapter_name].data = half[adapter_name].data.to(home)
        if adapter_name in self.shared:
            shared = self.__dict__["_bank"](adapter_name, self.shared[adapter_name])
            if home.type != "meta" and shared.device.type == "cpu":
                shared.data = shared.data.to(home)

    def __repr__(self) -> str:
        return f"lor2c.{super().__repr__()}"


class LoR2CLinear(AdaptedLinear, LoR2CLayer):
    """A query or value whose plain LoRA wakes when its layer's path is given up: y = W x + scale B A dropout(x).

    Until then it gives no gradient and costs nothing, but its parameters are there, in the optimiser, from the start.
    """

    method = "lor2c"
    adapter_layer_names = ("lor2c_A", "lor2c_B")
    other_param_names = ("awake", "scale", "lora_dropout")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: object) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.lor2c_A = nn.ParameterDict()
        self.lor2c_B = nn.ParameterDict()
        self.awake: dict[str, bool] = {}
        self.scale: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}

    def join(self, adapter: str, rank: int, scale: float, dropout: float, init: bool | str) -> None:
        """Give `adapter` a pair here, asleep: A (rank, d_in) random, B (d_out, rank) zero, or as `init` says."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        on_meta = device is not None and device.type == "meta"
        pair = fresh_pair(self.in_features, self.out_features, rank, init, "meta" if on_meta else "cpu")
        self.lor2c_A[adapter] = nn.Parameter(pair.A.to(device=device, dtype=dtype))
        self.lor2c_B[adapter] = nn.Parameter(pair.B.to(device=device, dtype=dtype))
        self.awake[adapter], self.scale[adapter], self.lora_dropout[adapter] = False, scale, dropout

    @property
    def adapters(self) -> Collection[str]:
        return [adapter for adapter, awake in self.awake.items() if awake]

    def _get_available_adapters(self) -> set[str]:
        return set(self.awake)

    def own_factors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The pair of `adapter`, by "A" and "B"."""
        if adapter not in self.awake:
            return {}
        return {"A": self.lor2c_A[adapter], "B": self.lor2c_B[adapter]}  # type: ignore[dict-item]

    def raw_pair(self, adapter: str) -> FactorPair:
        """A and B without the scale."""
        return FactorPair(self.lor2c_A[adapter], self.lor2c_B[adapter])

    def effective_pair(self, adapter: str) -> FactorPair:
        return stack([self.raw_pair(adapter)], [self.scale[adapter]])

    def tensors(self, adapter: str) -> FactorPair:
        return self.raw_pair(adapter)

    def dropout(self, adapter: str) -> float:
        return self.lora_dropout[adapter]
