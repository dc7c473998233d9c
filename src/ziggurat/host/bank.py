"""Shared factor pairs, owned once at the root of the model and read at forward time.

Registering one pair in every layer that uses it makes PEFT write it once per layer;
owning it in the first of those layers breaks under FSDP2, which reshards that layer
after its forward. So a bank is registered once, at the base model's root, and the
adapted linears hold an unregistered reference to it and *call* it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.lowrank.pair import FactorPair, init_gaussian_, init_kaiming_, on_device, stack


def fresh_pair(d_in: int, d_out: int, rank: int, init: bool | str, device: str = "cpu") -> FactorPair:
    """A new pair. `init` True: A uniform as LoRA's, B = 0, so that its delta is 0 (MSPLoRA, Eq. 2).

    "gaussian": A normal with standard deviation 1 / rank, B = 0. False: A and B both
    uniform as LoRA's A, a pair that changes the model at once, for tests.
    """
    a = torch.empty(rank, d_in, device=device)
    b = torch.zeros(d_out, rank, device=device)
    if init == "gaussian":
        init_gaussian_(a)
    else:
        init_kaiming_(a)
    if init is False:
        init_kaiming_(b)
    return FactorPair(a, b)


class Component(NamedTuple):
    """One pair of a bank as one linear uses it: the pair's name and its scale there."""

    pair: str
    scale: float


class Factors(nn.Module):
    """The factor tensors of one adapter, by name: parameters `<pair>:A` and `<pair>:B`."""

    def has(self, pair: str) -> bool:
        return f"{pair}:A" in self._parameters

    def pair(self, name: str) -> FactorPair:
        """The pair called `name`: A (rank, d_in) and B (d_out, rank)."""
        a, b = self._parameters[f"{name}:A"], self._parameters[f"{name}:B"]
        assert a is not None and b is not None
        return FactorPair(a, b)

    def names(self) -> list[str]:
        """The pairs' names, in the order of their creation."""
        return [key.removesuffix(":A") for key in self._parameters if key.endswith(":A")]


class PairBank(nn.Module, BaseTunerLayer):
    """All factor pairs of a method's adapters. A method's bank names its attribute in `adapter_layer_names`.

    It is a tuner layer without a base layer: PEFT finds, saves, casts, freezes and
    deletes its parameters as those of any other tuner layer. `weight` and `bias` are
    there because PEFT's properties of these names would look for a base layer for ever,
    the number of features because PEFT expects it of every tuner layer.
    """

    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]
    in_features = None
    out_features = None

    def __init__(self) -> None:
        super().__init__()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._detached: dict[str, frozenset[str]] = {}
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @classmethod
    def at_root(cls, root: nn.Module, name: str) -> Self:
        """The bank called `name` at `root`, the base model's; a new one where there is none.

        Raises:
            ConfigError: the model has something else of that name.
        """
        bank = getattr(root, name, None)
        if bank is None:
            bank = cls()
            root.add_module(name, bank)
        if not isinstance(bank, cls):
            raise ConfigError(
                f"the model has an attribute {name!r} of type {type(bank).__name__}, the name under which an adapter "
                "keeps the factors that its layers share. Rename it."
            )
        return bank

    @property
    def stores(self) -> nn.ModuleDict:
        """Adapter name -> `Factors`."""
        return getattr(self, self.adapter_layer_names[0])

    def factors(self, adapter: str) -> Factors:
        """The tensors of `adapter`; made empty when it is new."""
        if adapter not in self.stores:
            self.stores[adapter] = Factors()
        return self.stores[adapter]  # type: ignore[return-value]

    def create(
        self,
        adapter: str,
        pair: str,
        d_in: int,
        d_out: int,
        rank: int,
        init: bool | str,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Add the pair called `pair` to `adapter` unless it is there: A random, B zero (or as `init` says).

        Numbers are drawn on the CPU and in the default dtype, so that a seed gives
        the same adapter on every device.
        """
        factors = self.factors(adapter)
        if factors.has(pair):
            return
        drawn = fresh_pair(d_in, d_out, rank, init, "meta" if device is not None and device.type == "meta" else "cpu")
        factors.register_parameter(f"{pair}:A", nn.Parameter(drawn.A.to(device=device, dtype=dtype)))
        factors.register_parameter(f"{pair}:B", nn.Parameter(drawn.B.to(device=device, dtype=dtype)))

    def forward(self, adapter: str, components: Sequence[Component]) -> FactorPair:
        """The effective pair of one linear: its components stacked, each scaled.

        A = [A_1; ...; A_n] (sum of ranks, d_in), B = [s_1 B_1, ..., s_n B_n] (d_out, sum of ranks).
        """
        factors: Factors = self.stores[adapter]  # type: ignore[assignment]
        detached = self._detached.get(adapter, frozenset())
        pairs = [factors.pair(component.pair) for component in components]
        # Each pair lies where the first of its layers does; the finest one's is nearest to this linear.
        pairs = [on_device(pair, pairs[-1].B.device) for pair in pairs]
        if detached:
            pairs = [
                FactorPair(p.A.detach(), p.B.detach()) if component.pair in detached else p
                for p, component in zip(pairs, components, strict=True)
            ]
        return stack(pairs, [component.scale for component in components])

    def hold_still(self, adapter: str, pairs: Iterable[str]) -> None:
        """Give the named pairs of `adapter` no gradient from now on (an empty iterable: all learn again).

        They keep `requires_grad` and their place in the optimiser, which passes over
        parameters whose gradient is None: no step, no decay, no moments.
        """
        self._detached[adapter] = frozenset(pairs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters are merged; the linears change the weights."""
        names = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters.extend(name for name in names or () if name in self.stores)

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._detached.pop(adapter_name, None)

    def move_from_cpu(self, adapter: str, components: Sequence[Component], device: torch.device) -> None:
        """Bring pairs that were loaded on the CPU to the device of the first linear that asks."""
        factors = self.factors(adapter)
        for component in components:
            for half in ("A", "B"):
                parameter = factors._parameters[f"{component.pair}:{half}"]
                if parameter is not None and parameter.device.type == "cpu" and device.type not in ("cpu", "meta"):
                    parameter.data = parameter.data.to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: PEFT's `convert_to_lora` works linear by linear and by SVD; `ziggurat.export` is exact."""
        return False
