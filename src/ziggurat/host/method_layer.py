"""The base class of all tuner layers of methods: their tensors, by adapter, and the pair that they compute."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ziggurat.host.bank import Bank, Stores
from ziggurat.host.draws import Draws
from ziggurat.host.method import EVALUATION, Context, Method, pair_of, redirected, specs_of
from ziggurat.host.site import Site
from ziggurat.host.tensors import ByAdapter, Factors, TensorSpec, Weight, draw, drawn_again
from ziggurat.lowrank.pair import FactorPair

BANK, DRAWS = "_bank", "_draws"


class MethodLayer(Stores):
    """A tuner layer at one site. Subclasses by method have `method`, and are modules.

    Tensors of this site alone lie here, so that FSDP shards them with the layer; shared ones lie in the bank at the
    root, to which a layer holds an unregistered reference.
    """

    method: ClassVar[Method]
    other_param_names = ("configs", "sites", "leaves", "inactive")

    def _begin(self) -> None:
        super()._begin()
        setattr(self, self.method.store, ByAdapter())
        self.configs: dict[str, Any] = {}
        self.sites: dict[str, Site] = {}
        #: Adapter -> key -> (whether the tensor lies in the bank, its leaf name).
        self.leaves: dict[str, dict[str, tuple[bool, str]]] = {}
        #: Adapters whose tensors here are inactive at present.
        self.inactive: dict[str, bool] = {}

    @property
    def stores(self) -> nn.ModuleDict:
        """Adapter -> `Factors`, the tensors of this layer alone."""
        return self._modules[self.method.store]  # type: ignore[return-value, attr-defined]

    @property
    def adapters(self) -> Collection[str]:
        """The adapters that act here."""
        return [adapter for adapter in self.leaves if not self.inactive.get(adapter)]

    def acting(self) -> list[str]:
        """The active adapters with an update here."""
        adapters = [] if self._disable_adapters else self.adapters
        return [adapter for adapter in self.active_adapters if adapter in adapters]

    def training_adapters(self) -> list[str]:
        """The active adapters that have a trainable tensor at this site."""
        active = [] if self._disable_adapters else [name for name in self.active_adapters if name in self.leaves]
        return [adapter for adapter in active if any(t.requires_grad for t in self.stored(adapter).values())]

    def join(
        self,
        adapter: str,
        config: Any,
        site: Site,
        specs: Mapping[str, TensorSpec],
        bank: Bank | None,
        draws: Draws | None,
    ) -> None:
        """Create the tensors of `adapter` at this site; a shared tensor that exists already is left as it is."""
        for name, value in ((BANK, bank), (DRAWS, draws)):
            if value is not None:
                # Past nn.Module.__setattr__, so that the bank is registered at the root alone.
                object.__setattr__(self, name, value)
        private = Factors()
        weight, (device, dtype) = self.weight_of_base(site.path), self.home()
        self.leaves[adapter] = {}
        if bank is not None:
            bank.configs.setdefault(adapter, config)
        for key, spec in specs.items():
            leaf = spec.leaf(key)
            self.leaves[adapter][key] = (bool(spec.shared), leaf)
            if not spec.shared:
                private.add(leaf, spec, draw(spec, weight, device, dtype))
            else:
                assert bank is not None
                if leaf not in (shared := bank.factors(adapter)):
                    shared.add(leaf, spec, draw(spec, weight, device, dtype))
        self.stores[adapter] = private
        self.configs[adapter], self.sites[adapter] = config, site

    def draw_seeded(self, adapter: str) -> None:
        """Draw the tensors with a seed that lie on the meta device: a base without weights has put them there."""
        for key, spec in specs_of(self.method, self.configs[adapter], self.sites[adapter]).items():
            if spec.seed is not None and (held := self._held(adapter, *self.leaves[adapter][key])).is_meta:
                in_bank, leaf = self.leaves[adapter][key]
                factors: Any = self.bank_factors(adapter) if in_bank else self.stores[adapter]
                factors.put(leaf, drawn_again(spec, self.sites[adapter].path).to(held.dtype))

    def stored(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of `adapter` at this site, by key."""
        leaves = self._places(adapter)
        shared = [leaf for in_bank, leaf in leaves.values() if in_bank]
        from_bank = iter(self.__dict__[BANK](adapter, shared) if shared else ())
        private: Factors = self.stores[adapter]  # type: ignore[assignment]
        tensors = {key: next(from_bank) if in_bank else private[leaf] for key, (in_bank, leaf) in leaves.items()}
        if not shared:
            return tensors
        # A shared tensor lies where the first of its layers does; the last key's is the nearest to this layer.
        home = tensors[next(reversed(tensors))].device
        for tensor in tensors.values():
            if tensor.device != home:
                return {key: t if t.is_meta else t.to(home) for key, t in tensors.items()}
        return tensors

    def bank_factors(self, adapter: str) -> Factors:
        """The tensors of `adapter` that the layers share."""
        return self.__dict__[BANK].factors(adapter)

    def held(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of `adapter` at this site, by key, as they were created: `stored` may give detached or copied
        ones."""
        return {key: self._held(adapter, *place) for key, place in self.leaves[adapter].items()}

    def _held(self, adapter: str, in_bank: bool, leaf: str) -> Tensor:
        return (self.bank_factors(adapter) if in_bank else self.stores[adapter])[leaf]  # type: ignore[return-value, index]

    def _places(self, adapter: str) -> dict[str, tuple[bool, str]]:
        """Key -> (whether the tensor lies in the bank, its leaf name), of the tensors that are read at present."""
        leaves = self.leaves[adapter]
        if self.method.reads is None:
            return leaves
        return leaves | redirected(self.method, self.configs[adapter], self.sites[adapter])

    def context(self, adapter: str) -> Context:
        """The context of the forward pass that is being computed."""
        if not self.training:  # type: ignore[attr-defined]
            return EVALUATION
        draws: Draws | None = self.__dict__.get(DRAWS)
        return Context(True, draws.of(adapter) if draws is not None else None)

    def effective_pair(self, adapter: str, context: Context = EVALUATION) -> FactorPair:
        """The pair of `adapter`'s whole update here: A (rank, d_in), B (d_out, rank), scale folded in."""
        return self.pair_of(adapter, self.stored(adapter), context)

    def pair_of(self, adapter: str, tensors: dict[str, Tensor], context: Context = EVALUATION) -> FactorPair:
        """`effective_pair`, with `tensors` in the place of those that `stored` gives."""
        return pair_of(self.method, self.configs[adapter], self.sites[adapter], tensors, context)

    def dropout(self, adapter: str) -> float:
        """The probability that an input of `adapter`'s update is dropped in training."""
        return self.configs[adapter].dropout_at(self.sites[adapter])

    def state_of(self, adapter: str) -> tuple[object, ...]:
        """A key that changes whenever the pair of `adapter` in a training pass does: the tensors that it reads, their
        versions, and which of them are held still."""
        bank: Bank | None = self.__dict__.get(BANK)
        private = self.stores[adapter]
        shared, waiting = (None, None) if bank is None else (bank.factors(adapter), bank.held_still(adapter))
        tensors = [(shared if in_bank else private)[leaf] for in_bank, leaf in self._places(adapter).values()]  # type: ignore[index]
        versions = [None if t.is_inference() else t._version for t in tensors]
        return self.dropout(adapter), self.context(adapter).drawn, waiting, versions, [id(t) for t in tensors]

    def weight_of_base(self, path: str) -> Weight:
        """The frozen weight, for an initialisation that starts from it."""
        raise NotImplementedError

    def home(self) -> tuple[torch.device | None, torch.dtype]:
        """The device that this layer computes on, and the dtype of fresh tensors."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Never to the meta device, where loaded tensors would be lost, and never to another dtype."""
        home = device or self.home()[0]
        if adapter_name not in self.leaves or home is None:
            return
        self.stores[adapter_name].move(home)  # type: ignore[operator]
        if any(in_bank for in_bank, _ in self.leaves[adapter_name].values()):
            self.bank_factors(adapter_name).move(home)

    def __repr__(self) -> str:
        return f"{self.method.name}.{nn.Module.__repr__(self)}"  # type: ignore[arg-type]


class ExpertsLayer(Stores):
    """A tuner layer of fused experts: of all experts of a layer, or of one of their parameters (host/experts)."""

    stores: Mapping[str, Any] = {}


def layers_of(model: nn.Module, adapter: str | None = None, method: Method | None = None) -> Iterator[MethodLayer]:
    """The layers of methods in `model`; where they are given, those that have `adapter`, and those of `method`."""
    for module in model.modules():
        if not isinstance(module, MethodLayer) or (method is not None and module.method is not method):
            continue
        if adapter is None or adapter in module.sites:
            yield module


def stores_at(root: nn.Module, method: Method, adapter: str) -> Iterator[tuple[str, Any]]:
    """Path and stores of each layer and bank below `root` that has tensors of `adapter`."""
    for path, module in root.named_modules():
        if isinstance(module, MethodLayer | Bank) and module.method is method and adapter in module.stores:
            yield path, module.stores


def check_unmerged(layer: Stores) -> None:
    """Raise ValueError if a batch that names adapters comes to a layer with merged ones."""
    if layer.merged:
        raise ValueError("adapter_names can't be used while adapters are merged: call unmerge_adapter() first.")


def rows_by_adapter(
    adapter_names: Sequence[str], batch: int, adapters: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each of `adapters` that samples of a batch name, and the numbers of these samples ("__base__" is none of them).

    Raises:
        ValueError: there isn't one name for each sample.
    """
    if len(adapter_names) != batch:
        raise ValueError(
            f"adapter_names has {len(adapter_names)} names for a batch of {batch}: give one name a sample."
        )
    for adapter in sorted(set(adapter_names) & set(adapters)):
        yield adapter, torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=device)


def check_finite(weight: Tensor, adapter: str) -> None:
    """Raise ValueError unless a merged weight is finite."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: it holds or makes values "
            "that are not finite. The base weights were left as they were."
        )
