"""Adapted linear layers of one parent that read the same input (queries, keys and values) compute together.

The first one called multiplies the input by the A factors of all of them and keeps the others' products for their
calls, a moment later; on a processor it computes their whole outputs, frozen products and updates. So one dropout mask
serves them all, x is dropped out once in the forward and once in the backward, and one dL/dx comes back instead of one
per layer. Each call looks at whether the input is the same tensor, unchanged, under the same circumstances (gradients,
autocast, checkpointing) and with the same factors; where not, a linear layer computes alone.
"""

import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ziggurat.host.older import SHARES
from ziggurat.lowrank.pair import FactorPair, on_device
from ziggurat.lowrank.product import can_share, down, owns_output
from ziggurat.lowrank.remade import unchanged
from ziggurat.lowrank.whole import can_be_whole, whole

if TYPE_CHECKING:
    from ziggurat.host.linear import AdaptedLinear

#: Names of linear layers in one module that read one input. A name that is missing here costs the saving, nothing else.
READ_THE_SAME = (
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: Attention whose keys and values come from elsewhere than its queries.
_ACROSS = re.compile(r"cross|encoder_attn|enc(oder)?_?dec|attn2", re.IGNORECASE)
#: The name of the siblings in a linear layer's attributes.
SIBLINGS = "_siblings"


class Down(NamedTuple):
    """A linear layer's update h B^T, with h = dropout(x) A^T, (tokens, rank); `state` is `state_of` A and B."""

    h: Tensor
    B: Tensor
    state: tuple[object, ...] = ()

    @staticmethod
    def state_of(linear: "AdaptedLinear", adapter: str) -> tuple[object, ...]:
        return linear.state_of(adapter)


class Whole(NamedTuple):
    """A linear layer's whole output; `state` is that of the A, B and frozen layer in it."""

    y: Tensor
    state: tuple[object, ...] = ()

    @staticmethod
    def state_of(linear: "AdaptedLinear", adapter: str) -> tuple[object, ...]:
        base: Any = linear.base_layer
        return linear.state_of(adapter), owns_output(base), base.weight._version, base.weight.data_ptr()


Waiting = TypeVar("Waiting", Down, Whole)


class _Circumstances(NamedTuple):
    """The state, besides x, that decides a product's graph: two calls share one only if these are equal.

    `pack` tells one checkpoint from another and from none: the innermost hook on the tensors that autograd saves.
    """

    version: int
    requires_grad: bool
    grad: bool
    inference: bool
    autocast: torch.dtype | None
    pack: object

    @classmethod
    def of(cls, x: Tensor) -> "_Circumstances":
        device = x.device.type
        on = device != "meta" and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if on else None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
        pack = _reference(hooks[0]) if hooks and hooks[1] is not unchanged else None
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return cls(x._version, x.requires_grad, grad, inference, autocast, pack)


def _reference(hook: object) -> object:
    """Weak, because a checkpoint's hook holds its inputs. An object without weak references equals nothing, not even
    itself."""
    try:
        return weakref.ref(hook)
    except TypeError:
        return float("nan")


class _InFlight:
    """Products that wait for the calls of their linear layers: one set for one x of one adapter and thread.

    Copies are empty.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        #: Adapters of which nobody took a whole output once: from then on their layers only go down together.
        self.untaken: set[str] = set()

    def put(self, adapter: str, x: Tensor, waiting: "Mapping[int, Down | Whole]") -> None:
        self._drop(adapter)
        self._local.__dict__[adapter] = (weakref.ref(x), _Circumstances.of(x), dict(waiting))

    def take(self, adapter: str, x: Tensor, linear: "AdaptedLinear", kind: type[Waiting]) -> Waiting | None:
        """What waits for `linear`, of this kind, if `linear` would compute the same from this x."""
        of, circumstances, waiting = self._local.__dict__.get(adapter, (lambda: None, None, {}))
        if of() is not x or circumstances != _Circumstances.of(x):
            self._drop(adapter)
            return None
        product = waiting.get(id(linear))
        if not isinstance(product, kind):
            return None
        del waiting[id(linear)]
        if not waiting:
            del self._local.__dict__[adapter]
        return product if product.state == product.state_of(linear, adapter) else None

    def _drop(self, adapter: str) -> None:
        _, circumstances, waiting = self._local.__dict__.pop(adapter, (None, None, {}))
        untaken = any(isinstance(product, Whole) for product in waiting.values())
        if untaken and circumstances.pack is None:  # a checkpoint may stop computing before the last calls
            self.untaken.add(adapter)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_InFlight":
        return _InFlight()

    def __reduce__(self) -> Any:
        return _InFlight, ()


class Siblings:
    """The adapted linear layers of one parent whose names stand in one row of `READ_THE_SAME`."""

    def __init__(self) -> None:
        self.members: list[AdaptedLinear] = []
        self._in_flight = _InFlight()

    def whole(self, linear: "AdaptedLinear", x: Tensor, adapter: str, dropout: float) -> Tensor | None:
        """The output of `linear`, computed with those of the others, which then wait for their calls.

        None where the inputs are few, or where one of the layers can't be computed whole. A frozen product for a layer
        that isn't called with this x is lost: after the first such pass the layers only go down together. Except within
        checkpoints, which have to keep the same tensors when they compute a second time.
        """
        if (ready := self._in_flight.take(adapter, x, linear, Whole)) is not None:
            return ready.y
        others = list(self._others(linear, adapter, dropout))
        # The widest layer decides for all: the others' outputs are ready before their calls.
        if any(other.only_adapter() != adapter for other in others) or all(
            layer.is_few(x, dropout) for layer in (linear, *others)
        ):
            return None
        if others and adapter in self._in_flight.untaken and _Circumstances.of(x).pack is None:
            return None
        layers = [linear, *others]
        pairs = [layer.pair_now(adapter) for layer in layers]
        if not all(can_be_whole(layer.base_layer, pair, x) for layer, pair in zip(layers, pairs, strict=True)):
            return None
        y, *rest = whole(x, [layer.base_layer for layer in layers], pairs, dropout)
        if others:
            waiting = {
                id(other): Whole(y, Whole.state_of(other, adapter)) for y, other in zip(rest, others, strict=True)
            }
            self._in_flight.put(adapter, x, waiting)
        return y

    def down(self, linear: "AdaptedLinear", x: Tensor, adapter: str, dropout: float) -> Down | None:
        """h and B of `linear`; None if it has to work alone, by `low_rank_add`."""
        if (ready := self._in_flight.take(adapter, x, linear, Down)) is not None:
            return ready
        A, B = on_device(linear.pair_now(adapter), x.device)
        if not can_share(x, A):
            return None
        others = [
            (other, on_device(other.pair_now(adapter), x.device)) for other in self._others(linear, adapter, dropout)
        ]
        others = [(other, pair) for other, pair in others if _fits(pair, A)]
        if not others:
            return None
        first, *rest = down(x, [A, *(pair.A for _, pair in others)], dropout)
        waiting = {
            id(other): Down(h, pair.B, other.state_of(adapter)) for h, (other, pair) in zip(rest, others, strict=True)
        }
        self._in_flight.put(adapter, x, waiting)
        return Down(first, B)

    def _others(self, linear: "AdaptedLinear", adapter: str, dropout: float) -> "Iterator[AdaptedLinear]":
        """The other members that would add this adapter with this dropout if they were called now."""
        if not any(member is linear for member in self.members):  # a replica, whose siblings are others
            return
        for other in self.members:
            adds = not (other.disable_adapters or other.merged) and adapter in other.active_adapters
            if other is linear or not (other.training and adds and adapter in other.adapters):
                continue
            # A hook may have to fetch the factors first, as those of FSDP, DeepSpeed and accelerate do.
            hooked = other._forward_pre_hooks or "forward" in other.__dict__
            if not hooked and other.dropout(adapter) == dropout:
                yield other


def introduce(parent: nn.Module, path: str, kind: "type[AdaptedLinear]") -> None:
    """Group the linear layers of `kind` in `parent` by `READ_THE_SAME`; `path` is that of one of them."""
    if _ACROSS.search(path) or not SHARES:
        return
    for row in READ_THE_SAME:
        members = [child for name in row if isinstance(child := parent._modules.get(name), kind)]
        if len(members) > 1:
            group = Siblings()
            group.members = members
            for member in members:
                # Past nn.Module.__setattr__: no linear layer owns another.
                object.__setattr__(member, SIBLINGS, group)


def _fits(pair: FactorPair, A: Tensor) -> bool:
    other = pair.A
    return (type(other), other.dtype, other.device, other.shape[1]) == (type(A), A.dtype, A.device, A.shape[1])
