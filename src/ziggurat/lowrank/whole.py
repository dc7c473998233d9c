"""y_i = x W_i^T + b_i + (dropout(x) A_i^T) B_i^T for frozen linear layers of one input: one operation of autograd.

Beside a frozen layer's own operation, an update costs nodes of the graph, of which each Python one takes as long as a
small product, and a pass over (tokens, d) to add its dL/dx to the frozen layer's. Here the products with W and with A
add to one dL/dx as they are computed, for all linear layers that read x.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ziggurat.lowrank import plain_product
from ziggurat.lowrank.pair import FactorPair, is_plain
from ziggurat.lowrank.product import down_gradients_twice, owns_output, saved
from ziggurat.lowrank.remade import Remade, remade

_EXACT = (torch.float32, torch.float64)
_ON = os.environ.get("ZIGGURAT_WHOLE") != "0"


def can_be_whole(base: nn.Module, pair: FactorPair, x: Tensor) -> bool:
    """Whether `whole` may compute a layer and its pair: a plain frozen layer without hooks, on the processor, in x's
    dtype.

    The caller checks that torch isn't compiling or tracing (`transformed`). ZIGGURAT_WHOLE=0 in the environment makes
    it False everywhere.
    """
    if not _ON or x.device.type != "cpu" or x.dtype not in _EXACT or not owns_output(base):
        return False
    module = nn.modules.module
    hooks = (base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    hooks_of_all = (module._global_forward_pre_hooks, module._global_backward_hooks, module._global_backward_pre_hooks)
    if any(hooks) or any(hooks_of_all) or torch._C._len_torch_dispatch_stack():
        return False
    linear: Any = base
    held = [t for t in (linear.weight, linear.bias) if t is not None]
    return (
        not (torch.is_autocast_enabled("cpu") or any(t.is_inference() for t in (x, *held)))
        and all(is_plain(t) and t.dtype == x.dtype and t.device == x.device for t in (x, *pair, *held))
        and not any(t.requires_grad for t in held)
        and pair.A.shape[1] == linear.weight.shape[1] == x.shape[-1]
    )


def whole(x: Tensor, bases: Sequence[nn.Module], pairs: Sequence[FactorPair], dropout: float) -> tuple[Tensor, ...]:
    """``x W_i^T + b_i + (dropout(x) A_i^T) B_i^T`` of each linear layer and its pair: x is dropped out once for all.

    x (..., d_in), A_i (rank_i, d_in), B_i (d_out_i, rank_i), the scale folded into B_i; all of x's dtype. The outputs
    have the bits that the layers, `down` and `up_add` give. Gradients go to x, A_i and B_i, twice if asked.
    """
    As, Bs = [pair.A for pair in pairs], [pair.B for pair in pairs]
    learns = torch.is_grad_enabled() and any(A.requires_grad for A in As)
    frozen: Any = [(base.weight, base.bias) for base in bases]
    *ys, _ = _Whole.apply(x, dropout, remade(x) if learns else None, frozen, *As, *Bs)
    return tuple(ys)


class _Whole(torch.autograd.Function):
    """With g_i = dL/dy_i, h = [h_1, ..., h_n] as in `_Down` and dh_i = g_i B_i:

    dL/dx = sum of g_i W_i + s (dh A) * m;  dL/dA = s dh^T (x * m);  dL/dB_i = (h_i^T g_i)^T.

    h is an output too, so that a second derivative reaches x and A through the h in dL/dB.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropout: float,
        again: Remade | None,
        frozen: Sequence[tuple[Tensor, Tensor | None]],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(frozen)
        As, Bs = factors[:count], factors[count:]
        need_x, need_A = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4 : 4 + count])
        ctx.dropout, ctx.ranks = dropout, [A.shape[0] for A in As]
        ctx.like = plain_product.Like(x.shape, x.dtype, x.dtype, x_is_new=again is not None)
        ctx.set_materialize_grads(False)
        mask = plain_product.draw(x, dropout) if dropout else None
        h = plain_product.down(x, mask, As, dropout, x.dtype)
        hs = h.split(ctx.ranks, dim=1)
        ys = [
            plain_product.up_add(F.linear(x, *of), h_i, B, reuse_y=True)
            for of, h_i, B in zip(frozen, hs, Bs, strict=True)
        ]
        operands, ctx.make = ((x if need_A else None,), None) if again is None else again
        ctx.save_for_backward(
            mask,
            h if any(ctx.needs_input_grad[4 + count :]) else None,
            *(A if need_x else None for A in As),
            *(B if need_x or need_A else None for B in Bs),
            # Without its parameter, whose `data` a merge replaces: the memory that was read, as autograd keeps it.
            *(W.detach() if need_x else None for W, _ in frozen),
            *operands,
        )
        return *ys, h

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):  # whose casts products in place wouldn't follow
                return _gradients(ctx, *gs)
        return _gradients(ctx, *gs)


def _gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
    *gs, g_of_h = gs  # type: ignore[assignment]
    mask, h, *tensors = saved(ctx, gs, own=1)
    count, needs = len(ctx.ranks), ctx.needs_input_grad
    As, Bs, weights = (tensors[i : i + count] for i in range(0, 3 * count, count))
    operands, need_x, need_A, need_B = tensors[3 * count :], needs[0], needs[4 : 4 + count], needs[4 + count :]
    rows = {i: plain_product.flat(g) for i, g in enumerate(gs) if g is not None}  # of linear layers that did run
    dAs: list[Tensor | None] = [None] * count
    hs = [None] * count if h is None else h.split(ctx.ranks, dim=1)
    dBs = [(hs[i].T @ rows[i]).T if i in rows and need_B[i] else None for i in range(count)]  # type: ignore
    if not (rows or g_of_h is not None) or not (need_x or any(need_A)):
        return (None,) * 4 + (*dAs, *dBs)
    dhs = {i: plain_product.thin(g, Bs[i].T) for i, g in rows.items()}
    if g_of_h is not None:  # of a second derivative
        dhs = {i: g + dhs.get(i, 0) for i, g in enumerate(g_of_h.split(ctx.ranks, dim=1))}
    used, dh = list(dhs), plain_product.beside(list(dhs.values()))
    x = None
    if any(need_A[i] for i in used):
        x = operands[0] if ctx.make is None else ctx.make(operands).view(ctx.like.shape)
    theirs = [As[i] for i in used] if need_x else None
    if torch.is_grad_enabled():  # this backward is itself differentiated: nothing in place
        dA, dx = down_gradients_twice(plain_product, dh, x, ctx.like, mask, theirs, ctx.dropout)
        for i, g in rows.items() if need_x else ():
            dx = dx + (g @ weights[i]).view(ctx.like.shape)
    else:
        frozen = None
        for i, g in rows.items() if need_x else ():
            frozen = g @ weights[i] if frozen is None else frozen.addmm_(g, weights[i])
        dA, dx = plain_product.down_gradients(dh, x, ctx.like, mask, theirs, ctx.dropout, into=frozen)
    if dA is not None:
        for i, dA_i in zip(used, dA.split([ctx.ranks[i] for i in used]), strict=True):
            dAs[i] = dA_i if need_A[i] else None
    return dx, None, None, None, *dAs, *dBs
