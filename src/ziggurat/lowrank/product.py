"""y + (dropout(x) A^T) B^T: the product that every adapted linear layer computes besides its frozen weight.

The two thin products are cheap; passing over (tokens, d) and keeping copies of it is expensive. So one autograd
operation goes down, by A, and one goes up, by B, into the base output. They keep x itself (every linear layer that
reads the same x keeps the same tensor), the (tokens, rank) product and the dropout mask, as bits, as the numbers of
the dropped entries, or as a seed. Linear layers that read one x can go down together. Torch does both
(`plain_product`); large inputs on a GPU that are dropped out go down by Triton kernels (`triton_product`), which draw
the mask as they read x. In training on a processor `whole` computes the frozen product too.
"""

import os
from collections.abc import Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ziggurat.errors import ConfigError
from ziggurat.lowrank import mask as masks
from ziggurat.lowrank import plain_product
from ziggurat.lowrank.pair import is_plain, transformed
from ziggurat.lowrank.remade import Remade, remade

#: Up to so many tokens, as in generation, the number of operations matters, not the passes over memory.
_FEW = 16


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0, *, reuse_y: bool = False) -> Tensor:
    """``y + (dropout(x) A^T) B^T``.

    ================  =====================================================================
    x                 (..., d_in), any number of leading dimensions, any layout
    y                 (..., d_out), the leading dimensions of x; the result has its dtype
    A, B              (rank, d_in), (d_out, rank), the scale folded into B
    dropout           the probability of zeroing an entry of x, the others are multiplied by
                      1 / (1 - dropout); 0 in evaluation. Rounded to a multiple of 2^-16
    reuse_y           y's memory may take the result. Only for a y that was just computed, that nobody
                      else reads, and whose own backward does not need it: see `owns_output`
    ================  =====================================================================

    As in PEFT, x is converted to A's dtype and the sum is rounded to y's; under autocast the products are in
    autocast's dtype, as `torch.nn.functional.linear` has them. Gradients go to y, x, A and B, twice if asked. Where
    Triton is installed, the GPU, dtypes and sizes suit, and there are enough tokens (`triton_product.suits`, `pays`),
    Triton kernels do it (ZIGGURAT_TRITON=0 in the environment turns them off). When compiled, traced or transformed
    (torch.func, forward-mode derivatives), and for tensor subclasses (DTensor, FakeTensor), it is composed of plain
    operations with torch's own dropout: a compiler fuses them itself.

    Raises ConfigError if the shapes do not fit each other or dropout is outside 0..1.
    """
    _check(y, x, A, B, dropout)
    if transformed() or not (is_plain(y) and is_plain(x) and is_plain(A) and is_plain(B)):
        return composed(y, x, A, B, dropout)
    if not dropout and x.numel() <= _FEW * x.shape[-1] and not torch.is_grad_enabled():
        dtype = _product_dtype(x, A)
        if x.dtype == y.dtype == A.dtype == B.dtype == dtype:
            flat = plain_product.flat
            return torch.addmm(flat(y), flat(x).mm(A.t()), B.t()).view(y.shape)
    (h,) = down(x, [A], dropout)
    return up_add(y, h, B, reuse_y=reuse_y)


def can_share(x: Tensor, A: Tensor) -> bool:
    """Whether linear layers that read this x should take `down` together, and then `up_add` each.

    Not for tensor subclasses; and the caller must check that torch isn't compiling or tracing (`transformed`).
    """
    return is_plain(x) and is_plain(A) and not x.is_inference()


def composed(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    """The definition of `low_rank_add` in plain differentiable operations: used in compilation, and as the tests'
    reference."""
    dtype = _product_dtype(x, A)
    x = x.to(dtype)
    if dropout:
        x = F.dropout(x, dropout)
    return (y + F.linear(F.linear(x, A.to(dtype)), B.to(dtype))).to(y.dtype)


def owns_output(module: nn.Module) -> bool:
    """Whether ``module``'s output is new and has no other reader, so that `low_rank_add` may reuse its memory.

    True for exactly `torch.nn.Linear` with its own forward and without hooks: a hook could keep the output,
    a subclass or a replaced forward could return anything.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (module._forward_hooks or nn.modules.module._global_forward_hooks)
    )


def _parts_for(x: Tensor, As: Sequence[Tensor], dropout: float, dtype: torch.dtype) -> ModuleType:
    """The module that computes `down` with products in ``dtype``: Triton's kernels, or torch."""
    if x.is_cuda and (fused := _fused()) and fused.runs_on(x.device) and fused.suits(x, As, dropout, dtype):
        return fused
    return plain_product


@cache
def _fused() -> ModuleType | None:
    if os.environ.get("ZIGGURAT_TRITON", "1") == "0":
        return None
    try:
        from ziggurat.lowrank import triton_product
    except ImportError:
        return None
    return triton_product


def down(x: Tensor, As: Sequence[Tensor], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """``dropout(x) A_i^T`` for each A_i (rank_i, d_in), as (tokens, rank_i): x is dropped out once, and read once.

    The dtypes are those of `low_rank_add`. The As have one dtype and go to linear layers that read the same x:
    its mask is drawn and kept once, and dL/dx is made once, where each layer alone would do so for itself.
    """
    dtype = _product_dtype(x, As[0])
    return down_by(_parts_for(x, As, dropout, dtype), x, As, dropout, dtype)


def down_by(parts: Any, x: Tensor, As: Sequence[Tensor], dropout: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`down` with the products in ``dtype`` and the functions of ``parts``: `plain_product` or `triton_product`."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *As)):
        again = remade(x) if any(A.requires_grad for A in As) else None
        return _Down.apply(x, dropout, dtype, parts, again, *As)
    mask = parts.draw(x, dropout) if dropout else None
    return parts.down(x, mask, As, dropout, dtype).split([A.shape[0] for A in As], dim=1)


def up_add(y: Tensor, h: Tensor, B: Tensor, *, reuse_y: bool = False) -> Tensor:
    """``y + h B^T`` for h (tokens, rank) from `down`, in y's dtype and shape."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, h, B)):
        return _UpAdd.apply(y, h, B, reuse_y)
    return plain_product.up_add(y, h, B, reuse_y)


class _Down(torch.autograd.Function):
    """h = s (x * m) A^T with A = [A_1; ...; A_n], m the mask, s its scale; h is handed out in n parts.

    With dh = dL/dh, (tokens, rank):  dL/dA = s dh^T (x * m);  dL/dx = (dh s A) * m.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: float, dtype: torch.dtype, parts: Any, again: Remade | None, *As: Tensor
    ) -> tuple[Tensor, ...]:
        need_x, need_A = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        ctx.parts, ctx.dropout, ctx.dtype = parts, dropout, dtype
        ctx.like = plain_product.Like(x.shape, x.dtype, As[0].dtype, x_is_new=again is not None)
        ctx.ranks = [A.shape[0] for A in As]
        ctx.set_materialize_grads(False)
        mask = parts.draw(x, dropout) if dropout else None
        operands, ctx.make = ((x if need_A else None,), None) if again is None else again
        ctx.save_for_backward(mask, *(A if need_x else None for A in As), *operands)
        return parts.down(x, mask, As, dropout, dtype).split(ctx.ranks, dim=1)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        mask, *tensors = saved(ctx, dhs)
        As, operands = tensors[: len(ctx.ranks)], tensors[len(ctx.ranks) :]
        need_x, need_A = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        used = [i for i, dh in enumerate(dhs) if dh is not None]  # linear layers that did run
        if not used:
            return (None,) * (5 + len(As))
        dh = plain_product.beside([dhs[i] for i in used])  # type: ignore[misc]
        x = None
        if any(need_A[i] for i in used):
            x = operands[0] if ctx.make is None else ctx.make(operands).view(ctx.like.shape)
        # With grad mode on, this backward is itself differentiated: nothing in place.
        gradients = partial(down_gradients_twice, ctx.parts) if torch.is_grad_enabled() else ctx.parts.down_gradients
        dA, dx = gradients(dh, x, ctx.like, mask, [As[i] for i in used] if need_x else None, ctx.dropout)
        dAs: list[Tensor | None] = [None] * len(As)
        if dA is not None:
            for i, dA_i in zip(used, dA.split([ctx.ranks[i] for i in used]), strict=True):
                dAs[i] = dA_i if need_A[i] else None
        return dx, None, None, None, None, *dAs


def saved(ctx: Any, dhs: Sequence[Tensor | None], own: int | None = None) -> tuple[Any, ...]:
    """The saved tensors. After a backward through some of the linear layers only, `ctx` keeps them for the others.

    The layers are one node of the graph, which autograd frees after a backward; separate layers would be a node each.
    `own`: the place of one that the node computed. It is kept without its graph, in which `ctx` would hold itself: a
    second derivative takes the tensors that autograd holds, and if it has freed them torch asks for `retain_graph`.
    """
    kept = getattr(ctx, "kept", None)
    try:
        if kept is None or (own is not None and torch.is_grad_enabled()):
            tensors, versions = ctx.saved_tensors, None
        else:
            tensors, versions = kept
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "the input of an adapted linear layer, its frozen weight, or a factor of its adapter, was changed in place "
            "after the layer's forward and before its backward, which needs it as it was. Write x = x + y for x += y "
            f"where the input is made, or pass x.clone(). Torch says: {error}"
        ) from error
    if versions is not None and versions != _versions(tensors):
        raise RuntimeError(
            "an adapted linear layer's input, frozen weight or factor was changed in place between two backward passes."
        )
    ctx.waiting = getattr(ctx, "waiting", set(range(len(dhs)))) - {i for i, dh in enumerate(dhs) if dh is not None}
    held = [t.detach() if i == own and t is not None else t for i, t in enumerate(tensors)]
    ctx.kept = (held, _versions(held)) if ctx.waiting else None
    return tensors


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None]


class _UpAdd(torch.autograd.Function):
    """out = y + h B^T; with g = dL/dout, (tokens, d_out):  dL/dy = g;  dL/dh = g B;  dL/dB = (h^T g)^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, reuse_y: bool) -> Tensor:
        _, need_h, need_B, _ = ctx.needs_input_grad
        ctx.dtype, ctx.B_dtype = h.dtype, B.dtype
        ctx.save_for_backward(h if need_B else None, B if need_h else None)
        return plain_product.up_add(y, h, B, reuse_y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        need_y, need_h, need_B, _ = ctx.needs_input_grad
        h, B = ctx.saved_tensors
        rows = plain_product.flat(g).to(ctx.dtype)
        dh = plain_product.thin(rows, B.to(ctx.dtype).T) if need_h else None
        dB = (h.T @ rows).T.to(ctx.B_dtype) if need_B else None
        return g if need_y else None, dh, dB, None


def down_gradients_twice(
    parts: Any,
    dh: Tensor,
    x: Tensor | None,
    like: plain_product.Like,
    mask: Tensor | None,
    As: Sequence[Tensor] | None,
    dropout: float,
) -> tuple[Tensor | None, Tensor | None]:
    """`down_gradients` of ``parts`` from differentiable operations."""
    dh = dh * masks.keep_scale(dropout)
    ones = 1.0 if mask is None else parts.kept(mask, like.shape, dropout)
    dA = None if x is None else (dh.T @ plain_product.flat(x.to(dh.dtype) * ones)).to(like.A_dtype)
    dx = None if As is None else ((dh @ plain_product.joined(As).to(dh.dtype)).view(like.shape) * ones).to(like.dtype)
    return dA, dx


def _product_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, A.dtype):
        return torch.get_autocast_dtype(device)
    return A.dtype


def _check(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> None:
    fits = (
        y.shape[:-1] == x.shape[:-1] and A.shape == (B.shape[1], x.shape[-1]) and B.shape == (y.shape[-1], A.shape[0])
    )
    if not fits:
        raise ConfigError(
            f"low_rank_add got x {tuple(x.shape)}, y {tuple(y.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}: "
            "x must be (..., d_in), y (..., d_out) with the same leading dimensions, A (rank, d_in) and "
            "B (d_out, rank)."
        )
    if not 0 <= dropout <= 1:
        raise ConfigError(f"dropout={dropout}: it is a probability, give 0 to 1.")
