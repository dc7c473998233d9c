"""Adapters of the parameters with all experts of a layer, and one forward for all experts."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from ziggurat.errors import ConfigError
from ziggurat.host.bank import WithoutBase
from ziggurat.host.base.offload import check_in_place
from ziggurat.host.base.unwrap import look_through
from ziggurat.host.experts.terms import ExpertTerm, Starts, expert_terms, starts_of
from ziggurat.host.method import Method
from ziggurat.host.method_layer import ExpertsLayer, MethodLayer, check_finite, check_unmerged
from ziggurat.host.site import Site
from ziggurat.host.tensors import TensorSpec, Weight
from ziggurat.lowrank.grouped import grouped
from ziggurat.lowrank.pair import on_device, with_updates


class ParameterLayer(WithoutBase, MethodLayer, ExpertsLayer, nn.Module):
    """The adapters of one parameter with the weights of all experts of a layer: their tensors and pairs.

    It stands below an `AdaptedExperts`, which computes with it, under the parameter's name. It wraps nothing.
    """

    other_param_names = (*MethodLayer.other_param_names, "starts")

    def __init__(self, method: Method, experts: nn.Module, name: str) -> None:
        nn.Module.__init__(self)
        self.method = method  # type: ignore[misc]
        self.adapter_layer_names = (method.store,)
        self._begin()
        #: Adapter -> how its tensors divide the experts. Asked once: torch.compile can't follow a method's `tensors`.
        self.starts: dict[str, Starts] = {}
        self.name = name
        # Past nn.Module.__setattr__: the experts are a module of the layer above.
        object.__setattr__(self, "_experts", experts)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is adapted."""
        return getattr(self.__dict__["_experts"], self.name)

    def home(self) -> tuple[torch.device | None, torch.dtype]:
        """Device and dtype of fresh tensors: those of the parameter."""
        return self.parameter.device, self.parameter.dtype

    def weight_of_base(self, path: str) -> Weight:
        """The frozen weights, (experts, d_out, d_in), for an initialisation that starts from them."""
        transposed = self.__dict__["_experts"].is_transposed
        return Weight(path, lambda: self.parameter.mT if transposed else self.parameter)

    def join(self, adapter: str, config: Any, site: Site, specs: Mapping[str, TensorSpec], **more: Any) -> None:
        super().join(adapter, config, site, specs, **more)
        self.starts[adapter] = starts_of(specs)

    def terms(self, adapter: str) -> list[ExpertTerm]:
        """The update of `adapter` in the forward pass that is being computed, as a sum."""
        context = self.context(adapter)
        config, site, starts = self.configs[adapter], self.sites[adapter], self.starts[adapter]
        return expert_terms(self.method, config, site, starts, self.stored(adapter), context)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the layer above changes the parameter."""

    def unmerge(self) -> None:
        """Nothing: the layer above changes the parameter."""


class AdaptedExperts(WithoutBase, ExpertsLayer, nn.Module):
    """A layer's experts with low-rank updates of their weights: expert e computes with W_e + B_e A_e.

    y_e(x) = W_e x + b_e + B_e (A_e dropout(x)), for the gate and up projection and for the down projection, of the
    tokens that the router sends to e. Tokens are sorted by expert; each product is one for all of them.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._begin()
        #: The parameters as they were before anything was merged, while something is.
        self._unmerged: dict[str, Tensor] = {}

    def layers(self) -> list[ParameterLayer]:
        """The layers of the adapted parameters."""
        return [layer for layer in self._modules.values() if isinstance(layer, ParameterLayer)]

    def layer(self, name: str, method: Method, cls: type[ParameterLayer]) -> ParameterLayer:
        """The layer of the parameter called `name`; a new one of `cls` where there is none."""
        if name not in self._modules:
            self.add_module(name, cls(method, self.get_base_layer(), name))
        return self._modules[name]  # type: ignore[return-value]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is not None:
            check_unmerged(self)
            if any(not set(names).isdisjoint(layer.adapters) for layer in self.layers()):
                raise ValueError(
                    "adapter_names can't be used with adapters of fused experts: their tokens come sorted by expert, "
                    "not by sample. Run each adapter's samples in a batch of their own, after set_adapter(name)."
                )
        if self.merged and any(layer.disable_adapters for layer in self.layers()):
            self.unmerge()
        if names is not None or self.merged or not any(layer.acting() for layer in self.layers()):
            return self.base_layer(hidden_states, *args, **kwargs)
        index, weights = (*args, *kwargs.values())
        return self._computed(hidden_states, index, weights)

    def _computed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts' outputs, weighted and summed: x (tokens, d), index and weights (tokens, experts per token)."""
        base: Any = self.get_base_layer()
        if getattr(base, "_is_expert_parallel", False):
            raise ConfigError(
                "adapters of fused experts don't work with expert parallelism, where each device has some of the "
                "experts alone: load the model without it."
            )
        if base.down_proj.is_meta:
            layer = next(layer for layer in self.layers() if layer.acting())
            check_in_place(base, layer.sites[layer.acting()[0]].path.rpartition(".")[0])
        tokens, per_token = index.shape
        experts, order = torch.sort(index.reshape(-1))
        ends = torch.searchsorted(experts, torch.arange(len(base.down_proj), device=x.device), right=True).int()
        rows = order // per_token
        first = "gate_up_proj" if base.has_gate else "up_proj"
        h = self._product(first, x, rows, experts, ends)
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        y = self._product("down_proj", h, None, experts, ends)
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=x.device))
        return y[back].view(tokens, per_token, -1).sum(1).to(x.dtype)

    def _product(self, name: str, x: Tensor, rows: Tensor | None, experts: Tensor, ends: Tensor) -> Tensor:
        """W_e x + b_e + update for the rows of x that `rows` takes (None: all), which are sorted by expert."""
        base: Any = self.get_base_layer()
        W = getattr(base, name)
        x = x.to(W.dtype)
        taken = x if rows is None else x[rows]
        y = grouped(taken, W if base.is_transposed else W.mT, ends)
        if base.has_bias:
            y = y + getattr(base, f"{name}_bias")[experts]
        layer = self._modules.get(name)
        if isinstance(layer, ParameterLayer):
            for adapter in layer.acting():
                dropout = layer.dropout(adapter) if self.training else 0.0
                dropped = F.dropout(x, dropout) if dropout else x
                for term in layer.terms(adapter):
                    if not term.pair.A.shape[-2]:
                        continue  # all its directions were pruned
                    y = y + _update(term, dropped, taken if dropped is x else None, rows, ends)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W_e <- W_e + B_e A_e over the adapters named (default: the active ones) and those merged before.

        The sum is made in float32 and rounded once. W itself is kept until `unmerge`.

        Raises:
            ValueError: `safe_merge` and the sum is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names or self._active()) or ():
            layers = [layer for layer in self.layers() if adapter in layer.stores]
            summed = {layer.name: self._with_updates(layer, [*self.merged_adapters, adapter]) for layer in layers}
            for weight in summed.values() if safe_merge else ():
                check_finite(weight, adapter)
            for layer in layers:
                self._unmerged.setdefault(layer.name, layer.parameter.data)
                layer.parameter.data = summed[layer.name]
                layer.merged_adapters.append(adapter)
            if layers:
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Give the weights back as they were, bitwise."""
        for layer in self.layers():
            if layer.name in self._unmerged:
                layer.parameter.data = self._unmerged.pop(layer.name).to(layer.parameter.device)
            layer.merged_adapters.clear()
        self.merged_adapters.clear()

    def _active(self) -> list[str]:
        return list(dict.fromkeys(name for layer in self.layers() for name in layer.active_adapters))

    def _with_updates(self, layer: ParameterLayer, adapters: list[str]) -> Tensor:
        weight = self._unmerged.get(layer.name, layer.parameter.data).to(layer.parameter.device)
        pairs = [layer.effective_pair(adapter) for adapter in adapters if adapter in layer.stores]
        return with_updates(weight, pairs, self.get_base_layer().is_transposed)  # type: ignore[union-attr, arg-type]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete it from the layers of the parameters, before PEFT does, which asks here for the active ones."""
        for layer in self.layers():
            layer.delete_adapter(adapter_name)
        self._active_adapter = self._active()


def _update(term: ExpertTerm, x: Tensor, taken: Tensor | None, rows: Tensor | None, ends: Tensor) -> Tensor:
    """B_g (A_g x) for the rows of x that `rows` takes; `taken`: these rows, if they are gathered already.

    A pair that all experts share goes down once for each token, however many experts the token is sent to.
    """
    A, B = (half.to(x.dtype) for half in on_device(term.pair, x.device))
    if len(term.starts) == 1:
        h = x @ A.mT
        return (h if rows is None else h[rows]) @ B.mT
    if taken is None:
        taken = x if rows is None else x[rows]
    ends = ends[[*(start - 1 for start in term.starts[1:]), len(ends) - 1]]
    # torch's kernel wants ranks of a multiple of 16 bytes.
    padding = -A.shape[-2] % (16 // A.element_size())
    A, B = F.pad(A, (0, 0, 0, padding)).contiguous(), F.pad(B, (0, padding)).contiguous()
    return grouped(grouped(taken, A.mT, ends), B.mT, ends)


def wrapped_experts(model: nn.Module, path: str, method: Method) -> AdaptedExperts:
    """The `AdaptedExperts` at `path` in `model`; it takes the place of the experts where they have none yet.

    Raises:
        ConfigError: the experts have an adapter of another method.
    """
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    experts = owner.get_submodule(name)
    if isinstance(experts, AdaptedExperts) and all(layer.method is method for layer in experts.layers()):
        return experts
    if isinstance(experts, BaseTunerLayer) or look_through(experts) is not experts:
        raise ConfigError(
            f"the experts at {path!r} have an adapter of another method already ({type(experts).__name__}): merge or "
            "unload it first, or leave them out of target_parameters."
        )
    layer = AdaptedExperts(experts)
    setattr(owner, name, layer)
    return layer
