"""Shared tensors, owned once at the root of the model and read at forward time.

Registering one tensor in every layer that uses it makes PEFT write it once per layer; owning it in the first of those
layers breaks under FSDP2, which reshards that layer after its forward. So a bank is registered once, at the base
model's root, and the layers hold an unregistered reference to it and *call* it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.host.method import Method
from ziggurat.host.tensors import ByAdapter, Factors


class Stores(BaseTunerLayer):
    """A tuner layer whose adapters may have parameters in common."""

    stores: Any

    def _begin(self) -> None:
        """Set up the attributes of a tuner layer; to be called by `__init__`."""
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def forget(self, adapter: str) -> None:
        """Remove `adapter` without choosing another active adapter."""
        for name in self.adapter_layer_names + self.other_param_names:
            table = getattr(self, name)
            if adapter in table:
                del table[adapter]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, but a parameter shared by several adapters trains if one of the active ones trains it."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for adapter in self.active_adapters:
            if adapter in self.stores and not inference_mode:
                self.stores[adapter].requires_grad_(True)


class WithoutBase(BaseTunerLayer):
    """A tuner layer without a base layer.

    `weight` and `bias` exist because PEFT's properties of these names would recurse without a base layer, the feature
    counts because PEFT expects them of every tuner layer.
    """

    weight = None  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]
    in_features: Any = None
    out_features: Any = None


class Bank(nn.Module, WithoutBase, Stores):
    """All shared tensors of a method's adapters.

    PEFT finds, saves, casts, freezes and deletes its parameters like those of any other tuner layer.
    """

    method: ClassVar[Method]
    other_param_names = ("configs", "_held")

    def __init__(self) -> None:
        super().__init__()
        self._begin()
        self._held: dict[str, frozenset[str]] = {}
        #: Adapter -> a config whose tensors lie here.
        self.configs: dict[str, Any] = {}
        setattr(self, self.method.store, ByAdapter())

    @classmethod
    def of(cls, root: nn.Module) -> Self | None:
        """The bank of this class at `root`, or None."""
        bank = root._modules.get(cls.method.bank)
        return bank if isinstance(bank, cls) else None

    @classmethod
    def inside(cls, model: nn.Module) -> Self:
        """The bank of this class in `model`, which may be wrapped."""
        return next(module for module in model.modules() if isinstance(module, cls))

    @classmethod
    def at_root(cls, root: nn.Module) -> Self:
        """The bank at `root`, the base model; a new one where there is none.

        Raises:
            ConfigError: the model has something else of that name.
        """
        bank = getattr(root, cls.method.bank, None)
        if bank is None:
            bank = cls()
            root.add_module(cls.method.bank, bank)
        if not isinstance(bank, cls):
            raise ConfigError(
                f"the model has an attribute {cls.method.bank!r} of type {type(bank).__name__}, the name under which "
                "an adapter keeps the tensors that its layers share. Rename it."
            )
        return bank

    @property
    def stores(self) -> nn.ModuleDict:
        """Adapter -> `Factors`."""
        return self._modules[self.method.store]  # type: ignore[return-value]

    def factors(self, adapter: str) -> Factors:
        """The tensors of `adapter`; made empty when it is new."""
        if adapter not in self.stores:
            self.stores[adapter] = Factors()
        return self.stores[adapter]  # type: ignore[return-value]

    def forward(self, adapter: str, leaves: Sequence[str]) -> list[Tensor]:
        """The tensors of `adapter` called `leaves`; frozen ones (`hold_still`) are detached."""
        tensors = self.stores[adapter](leaves)
        if held := self._held.get(adapter):
            return [t.detach() if leaf in held else t for leaf, t in zip(leaves, tensors, strict=True)]
        return tensors

    def hold_still(self, adapter: str, leaves: Iterable[str]) -> None:
        """Freeze the named tensors of `adapter` until the next call (an empty iterable unfreezes all).

        They keep `requires_grad` and their place in the optimiser, which passes over parameters whose gradient is
        None: no step, no decay, no moments.
        """
        self._held[adapter] = frozenset(leaves)

    def held_still(self, adapter: str) -> frozenset[str]:
        """The names of the tensors of `adapter` that `hold_still` has frozen."""
        return self._held.get(adapter, frozenset())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters are merged; the linear layers change the weights."""
        names = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters.extend(name for name in names or () if name in self.stores)

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Nothing: the layers that read the tensors move them to their device."""
