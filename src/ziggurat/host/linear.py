"""The adapted linear layer: forward, delta, merge and unmerge around one effective factor pair, for every method."""

import copy
import os
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ziggurat.errors import ConfigError
from ziggurat.host.base.offload import check_in_place, runs_on
from ziggurat.host.base.quantised import FLOATS, backend_of, base_weight, check_changeable, replace_weight
from ziggurat.host.method_layer import BANK, MethodLayer, check_finite, check_unmerged, rows_by_adapter
from ziggurat.host.siblings import SIBLINGS, Siblings
from ziggurat.host.tensors import Weight
from ziggurat.lowrank.pair import FactorPair, delta, is_plain, on_device, transformed, with_updates
from ziggurat.lowrank.product import composed, low_rank_add, owns_output, up_add
from ziggurat.lowrank.whole import can_be_whole, whole

#: Adapter -> pair, in a layer's attributes while its model generates: see `generation`.
KEPT = "_kept"
#: In training, torch's own operations compute the update of an input that isn't dropped out, if it has, together with
#: the output, fewer entries than this: there, calling the shared products takes longer than they save (measured on a
#: processor, benchmarks/training_step.md). ZIGGURAT_FEW=0 in the environment turns it off.
FEW = 0 if os.environ.get("ZIGGURAT_FEW") == "0" else 1 << 17


def is_adaptable(module: nn.Module) -> bool:
    """Whether a factor pair can stand beside `module`: a linear layer, GPT-2's Conv1D, or a quantised linear layer."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Linear | Conv1D):
        return True
    quantised = any(hasattr(base, name) for name in ("qweight", "W_q", "codebooks"))
    return quantised or (hasattr(base, "in_features") and hasattr(base, "out_features") and hasattr(base, "weight"))


def is_router(module: nn.Module) -> bool:
    """Whether `module` is a router of transformers: it chooses experts by its product with `weight` (experts, d)."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = base._parameters.get("weight")
    is_one = type(base).__name__.lower().endswith("router") and not isinstance(base, nn.Linear)
    return is_one and weight is not None and weight.dim() == 2 and len(weight) == getattr(base, "num_experts", None)


def features(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer of any kind, or of a router.

    Raises:
        ConfigError: the layer doesn't tell its size.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    d_out, d_in = base.weight.shape if is_router(base) else reversed(_get_in_out_features(base))  # type: ignore[union-attr]
    if d_in is None or d_out is None:
        raise ConfigError(f"{type(base).__name__} has no in_features and out_features; leave it out of target_modules.")
    return int(d_in), int(d_out)


class AdaptedLinear(MethodLayer, nn.Module):
    """A linear layer W with low-rank updates: y = W x + sum over active adapters of B (A dropout(x)).

    (A, B) is the method's pair at this site. Merging, quantised bases and mixed batches follow from it. A router, which
    goes on to choose experts by its product, computes with W + sum of B A in the place of W.
    """

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._begin()
        base = self.get_base_layer()
        self.in_features, self.out_features = features(base)
        self.routes = is_router(base)
        # Conv1D keeps its weight as (d_in, d_out).
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.quantization_backend = backend_of(base, **quantization_kwargs)
        #: After a merge into a quantised weight: ||Q(W + dW) - (W + dW)||_F / ||dW||_F, else None.
        self.requantisation_error: float | None = None
        #: The weight before the merge, while an adapter is merged.
        self._unmerged: Tensor | None = None
        #: Whether another module holds the base weight too, so that a merge must not change it in place.
        self.shares_weight = False
        #: The shared parameter, in a tuple, while a merge has untied the two modules.
        self._tied: tuple[nn.Parameter, ...] = ()
        #: The base layer with trainable rows, in a tuple, while a merge has replaced it by a plain layer.
        self._with_rows: tuple[nn.Module, ...] = ()

    def weight_of_base(self, path: str) -> Weight:
        """The frozen weight, (d_out, d_in), for an initialisation that starts from it."""
        return Weight(path, lambda: base_weight(self).T if self.fan_in_fan_out else base_weight(self))

    def home(self) -> tuple[torch.device | None, torch.dtype]:
        """Device and dtype of fresh tensors: those of the base weight; float32 where no factor can have its dtype."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device, dtype or torch.float32

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the base; no dtype where entries are packed or of 8 bits, which no factor can have."""
        weight = getattr(base_layer, "weight", getattr(base_layer, "qweight", None))
        device, dtype = (None, None) if weight is None else (weight.device, weight.dtype)
        dtype = getattr(base_layer, "compute_dtype", dtype)  # the dtype of bitsandbytes' products with 4-bit weights
        if device is not None and device.type == "meta":
            device = runs_on(base_layer) or device
        return device, dtype if dtype in FLOATS else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.routes:
            return self._chosen(x, adapter_names, *args, **kwargs)
        if adapter_names is None and not args and not kwargs and (whole_y := self._whole(x)) is not None:
            return whole_y
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._add_by_sample(y, x, adapter_names)
        if self.merged:
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        reuse_y = self.quantization_backend is None and owns_output(self.base_layer)
        for adapter in self.acting():
            y = self._add(y, x, adapter, reuse_y)
        return y

    def _chosen(self, x: Tensor, adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        """A router's output for x, by the weight that a merge of the active adapters would give it."""
        acting = self.acting()
        if adapter_names is not None and not self.disable_adapters:
            check_unmerged(self)
            if not set(adapter_names).isdisjoint(self.adapters):
                raise ValueError(
                    "adapter_names can't be used with an adapter of a router, which computes with one weight for all "
                    "samples. Run each adapter's samples in a batch of their own, after set_adapter(name)."
                )
            acting = []
        if self.merged or not acting:
            return self.base_layer(x, *args, **kwargs)
        W: Tensor = self.base_layer.weight  # type: ignore[assignment]
        if W.is_meta:
            check_in_place(self.get_base_layer(), self.sites[acting[0]].path)
        pairs = [on_device(self.pair_now(adapter), W.device) for adapter in acting]
        return functional_call(self.base_layer, {"weight": with_updates(W, pairs, False)}, (x, *args), kwargs)

    def only_adapter(self) -> str | None:
        """The name of the one adapter that acts; None if none or several act, or if the layer is merged, quantised, a
        router, or adds something else than a pair."""
        if self.merged or self.routes or self.quantization_backend is not None:
            return None
        acting = self.acting() if type(self)._add is AdaptedLinear._add else []
        return acting[0] if len(acting) == 1 else None

    def is_few(self, x: Tensor, dropout: float) -> bool:
        """Whether nothing is dropped out of x, and x and the output together have fewer than `FEW` entries."""
        tokens = x.numel() // max(1, x.shape[-1])
        return not dropout and tokens * (self.in_features + self.out_features) < FEW

    def _whole(self, x: Tensor) -> Tensor | None:
        """The output in training, by one operation for the frozen product and the update; None where two compute it."""
        if not self.training or transformed() or (adapter := self.only_adapter()) is None:
            return None
        dropout = self.dropout(adapter)
        siblings: Siblings | None = self.__dict__.get(SIBLINGS)
        if siblings is not None:
            return siblings.whole(self, x, adapter, dropout)
        if self.is_few(x, dropout):
            return None
        pair = self.pair_now(adapter)
        return whole(x, [self.base_layer], [pair], dropout)[0] if can_be_whole(self.base_layer, pair, x) else None

    def _add(self, y: Tensor, x: Tensor, adapter: str, reuse_y: bool) -> Tensor:
        dropout = self.dropout(adapter) if self.training else 0.0
        few = self._are_few(x, dropout)
        siblings = None if few or not self.training or transformed() else self.__dict__.get(SIBLINGS)
        if siblings is not None and (shared := siblings.down(self, x, adapter, dropout)) is not None:
            return up_add(y, shared.h, shared.B, reuse_y=reuse_y)
        a, b = on_device(self.pair_now(adapter), x.device)
        return composed(y, x, a, b) if few else low_rank_add(y, x, a, b, dropout, reuse_y=reuse_y)

    def _are_few(self, x: Tensor, dropout: float) -> bool:
        """Whether torch's own operations compute the update of x: see `FEW`.

        Training decides, not gradients alone: a checkpointed layer computes once without gradients and once with them.
        """
        if transformed():  # a compiler would guard the sizes; low_rank_add is composed for it anyway
            return False
        return (self.training or torch.is_grad_enabled()) and self.is_few(x, dropout)

    def pair_now(self, adapter: str) -> FactorPair:
        """The pair for the forward pass that is being computed."""
        cache: dict[str, FactorPair] | None = self.__dict__.get(KEPT)
        if cache is None or self.training or transformed():
            return self.effective_pair(adapter, self.context(adapter))
        if adapter not in cache:
            pair = self.effective_pair(adapter)
            if not (is_plain(pair.A) and is_plain(pair.B)):
                return pair
            cache[adapter] = FactorPair(pair.A.clone(), pair.B.clone())  # a half may be a parameter itself
        return cache[adapter]

    def is_hooked(self) -> bool:
        """Whether a hook may have to fetch the factors first, as those of FSDP, DeepSpeed and accelerate do."""
        bank: nn.Module | None = self.__dict__.get(BANK)
        places = [self, *self.stores.modules(), *(() if bank is None else bank.modules())]
        return any(place._forward_pre_hooks or "forward" in place.__dict__ for place in places)

    def _add_by_sample(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Each sample of the batch with the adapter named for it ("__base__": none)."""
        check_unmerged(self)
        y = y.clone()
        for adapter, rows in rows_by_adapter(adapter_names, len(x), self.adapters, y.device):
            dropout = self.dropout(adapter) if self.training else 0.0
            a, b = on_device(self.pair_now(adapter), x.device)
            theirs = y[rows], x[rows]
            add = composed if self._are_few(theirs[1], dropout) else low_rank_add
            y[rows] = add(*theirs, a, b, dropout)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """B A in the layout of the base weight: (d_out, d_in), or (d_in, d_out) for Conv1D."""
        a, b = self.effective_pair(adapter)
        on_slow_half = a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16)
        update = delta(FactorPair(a.float(), b.float())).to(a.dtype) if on_slow_half else delta(FactorPair(a, b))
        return update.T if self.fan_in_fan_out else update

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- W + sum of B A over the adapters named (default: the active ones) and those merged before.

        The sum is made in float32 and rounded once. W itself is kept until `unmerge`: a copy of the adapted weights.
        A quantised weight is dequantised, added to and quantised again; the error that this makes is kept in
        `requantisation_error`, and a model's merge logs it.

        Raises:
            ValueError: `safe_merge` and the sum is not finite; or a weight that can't be dequantised, with the way
                round it.
        """
        for adapter in check_adapters_to_merge(self, adapter_names) or ():
            if adapter not in self.adapters:
                continue
            check_changeable(self.quantization_backend)
            if self.quantization_backend is not None:
                self._shift_quantised(adapter, +1.0, safe_merge)
            else:
                if isinstance(self.base_layer, TrainableTokensWrapper):  # its rows replace those of its weight
                    self._with_rows, self.base_layer = (self.base_layer,), rows_merged(self.base_layer)
                base: Any = self.get_base_layer()
                before = base.weight.data if self._unmerged is None else self._unmerged.to(base.weight.device)
                pairs = [self.effective_pair(name) for name in (*self.merged_adapters, adapter)]
                summed = with_updates(before, pairs, self.fan_in_fan_out)
                if safe_merge:
                    check_finite(summed, adapter)
                if self.shares_weight and not self._tied:
                    self._tied = (base.weight,)
                    base.weight = nn.Parameter(summed, requires_grad=base.weight.requires_grad)
                self._unmerged, base.weight.data = before, summed
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W bitwise; a quantised W is restored up to rounding."""
        if self._unmerged is not None:
            base: Any = self.get_base_layer()
            if self._tied:
                base.weight, self._tied = self._tied[0], ()
            else:
                base.weight.data = self._unmerged.to(base.weight.device)
            self._unmerged = None
            self.merged_adapters.clear()
        if self._with_rows:
            self.base_layer, self._with_rows = self._with_rows[0], ()
        if (bank := self.__dict__.get(BANK)) is not None:
            bank.unmerge()  # it only notes which adapters are merged
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.adapters:
                self._shift_quantised(adapter, -1.0)

    def _shift_quantised(self, adapter: str, sign: float, safe: bool = False) -> None:
        weight = base_weight(self)
        update = self.get_delta_weight(adapter).to(weight.device)
        shifted = weight + sign * update.to(weight.dtype)
        if safe:
            check_finite(shifted, adapter)
        error, size = replace_weight(self, shifted), float(update.float().norm())
        self.requantisation_error = error / size if size else None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.method.pair is not None


def rows_merged(wrapper: TrainableTokensWrapper) -> nn.Module:
    """A copy of the linear layer in PEFT's `wrapper` (trainable_token_indices) with the trained rows in its weight."""
    inner: Any = wrapper.token_adapter.base_layer
    weight: Any = wrapper.weight
    layer = copy.copy(inner)
    layer._parameters = dict(inner._parameters)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer
