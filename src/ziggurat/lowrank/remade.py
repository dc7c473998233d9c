"""Inputs that the backward pass recomputes from tensors that autograd keeps anyway.

A frozen linear layer keeps no input for its backward; an adapted one needs its input for dL/dA. Most inputs in a
transformer are made by one cheap step whose own backward keeps the operands: act(gate) * up before the MLP's last
linear layer, w * (h / rms(h)) before queries, keys, values, gate and up, gelu(h) in an encoder's MLP. Keeping the
result as well would spend memory to save one multiplication. `remade` finds the operands in autograd's graph.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _autograd
from torch.nn import functional as F

from ziggurat.lowrank.pair import is_plain

#: Entries of x from which keeping operands in its place is worth the calls of making x again.
_LEAST = 1 << 15

Make = Callable[[Sequence[Tensor]], Tensor]


class Remade(NamedTuple):
    """``make(operands)`` is x as (tokens, d), bit for bit. The operands are views of x's shape, kept by x's graph."""

    operands: tuple[Tensor, ...]
    make: Make


def unchanged(tensor: Tensor) -> Tensor:
    """The unpacking hook for `saved_tensors_hooks` that only observe; under any other hooks every input is kept.

    Those may move kept tensors elsewhere (to the CPU, to disk) or drop them (checkpoints), and looking fetches them.
    """
    return tensor


def remade(x: Tensor) -> Remade | None:
    """A way to recompute x; None if there is none known, if x is small, or was changed in place after it was made.

    ZIGGURAT_REMAKE=0 in the environment turns it off. Tensors changed through `.data` can't be told from others.
    """
    if x.numel() < _LEAST or x.grad_fn is None or x._version or _kept_elsewhere():
        return None
    operands: list[Tensor] = []
    try:
        make = _making(x.grad_fn, x, operands)
    except RuntimeError:  # the graph has been freed by a backward, or operands have no rows without a copy
        return None
    return None if make is None else Remade(tuple(operands), make)


def _kept_elsewhere() -> bool:
    top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.6
    if top is None or torch._C._len_torch_dispatch_stack() or os.environ.get("ZIGGURAT_REMAKE") == "0":
        return True
    hooks = top(True)
    return hooks is not None and hooks[1] is not unchanged


def _making(node: Any, x: Tensor, operands: list[Tensor]) -> Make | None:
    """A function that recomputes the output of `node`; its operands are added to `operands`."""
    kind = type(node).__name__
    if kind == "MulBackward0":
        left = _operand(node._saved_self, node, 0, x, operands)
        right = _operand(node._saved_other, node, 1, x, operands)
        return left and right and (lambda values: left(values) * right(values))
    if kind == "ToCopyBackward0":
        made, dtype = _making(node.next_functions[0][0], x, operands), node._input_metadata[0].dtype
        return made and (lambda values: made(values).to(dtype))
    if kind == "GeluBackward0":
        made, activation = (
            _operand(node._saved_self, node, 0, x, operands),
            partial(F.gelu, approximate=node._saved_approximate),
        )
        return made and (lambda values: activation(made(values)))
    return None


def _operand(saved: Tensor | None, node: Any, number: int, x: Tensor, operands: list[Tensor]) -> Make | None:
    """An operand of `node`: kept by it; or made in turn, where the node needs the other operand alone."""
    if saved is None:
        return _making(node.next_functions[number][0], x, operands)
    # A scalar doesn't influence a product's dtype; an expanded one would.
    if not saved.dim() or not is_plain(saved) or saved.device != x.device:
        return None
    place = len(operands)
    operands.append(saved.expand(x.shape).view(-1, x.shape[-1]))
    return lambda values: values[place]
