"""y + (dropout(x) A^T) B^T: what every adapted linear computes besides its frozen weight.

The two thin products are cheap; what costs is passing over (tokens, d) and keeping copies of it. So one autograd
operation goes down and one goes up into the base output. They keep x itself (every linear that reads the same x
keeps the same tensor), the (tokens, rank) product and the dropout mask as bits; a dropped-out copy of x is made
again in the backward, in parts that fit a processor's cache. Linears that read one x can go down together.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ziggurat.errors import ConfigError
from ziggurat.lowrank import mask as masks

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_PART = 1 << 20  # bytes of x converted or masked at a time on a CPU


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

    As in PEFT, x is converted to A's dtype and the sum is rounded to y's; under autocast the products
    are in autocast's dtype, as `torch.nn.functional.linear` has them. Gradients go to y, x, A and B, twice
    if asked. Where Triton is installed and the GPU and the dtypes suit, Triton kernels do it
    (ZIGGURAT_TRITON=0 in the environment turns them off). When compiled, traced or transformed (torch.func,
    forward-mode derivatives), and for tensor subclasses (DTensor, FakeTensor), it is composed of plain operations with
    torch's own dropout: a compiler fuses them itself.

    Raises ConfigError if the shapes do not fit each other or dropout is outside 0..1.
    """
    _check(y, x, A, B, dropout)
    tensors = (y, x, A, B)
    if transformed() or not all(type(t) in _PLAIN for t in tensors):
        return composed(y, x, A, B, dropout)
    if fused := _fused_for(*tensors):
        return fused.fused_low_rank_add(y, x, A, B, dropout, _product_dtype(x, A), reuse_y)
    (h,) = down(x, [A], dropout)
    return up_add(y, h, B, reuse_y=reuse_y)


def can_share(x: Tensor, A: Tensor) -> bool:
    """Whether linears that read this x should take `down` together, and then `up_add` each.

    Not for tensor subclasses, nor where a Triton kernel does all of `low_rank_add` at once; and the caller must see
    to it that torch isn't following the operations (`transformed`).
    """
    plain = type(x) in _PLAIN and type(A) in _PLAIN
    return plain and not x.is_inference() and _fused_for(x, x, A, A) is None


def transformed() -> bool:
    """Whether torch follows the operations themselves: it compiles, traces, or takes derivatives by torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def composed(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    """The same value from plain differentiable operations: what is compiled, and what tests compare with."""
    dtype = _product_dtype(x, A)
    x = x.to(dtype)
    if dropout:
        x = F.dropout(x, dropout)
    return (y + F.linear(F.linear(x, A.to(dtype)), B.to(dtype))).to(y.dtype)


def owns_output(module: nn.Module) -> bool:
    """Whether what ``module`` returns is new and read by nobody else, so that `low_rank_add` may reuse its memory.

    True for exactly `torch.nn.Linear` with its own forward and without hooks: a hook could keep the output,
    a subclass or a replaced forward could return anything.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (module._forward_hooks or nn.modules.module._global_forward_hooks)
    )


def _fused_for(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> ModuleType | None:
    if x.is_cuda and (fused := _fused()) and fused.runs_on(x.device) and fused.suits(y, x, A, B, _product_dtype(x, A)):
        return fused
    return None


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

    The dtypes are those of `low_rank_add`. The As have one dtype and go to linears that read the same x: its mask is
    drawn and kept once, and dL/dx is made once, where each linear alone would do so for itself.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *As)):
        return _Down.apply(x, dropout, *As)  # type: ignore[no-any-return]
    mask = masks.draw(x, dropout) if dropout else None
    return _down(x, mask, _joined(As, masks.keep_scale(dropout), _product_dtype(x, As[0]))).split(_ranks(As), dim=1)


def up_add(y: Tensor, h: Tensor, B: Tensor, *, reuse_y: bool = False) -> Tensor:
    """``y + h B^T`` for h (tokens, rank) from `down`, in y's dtype and shape."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, h, B)):
        return _UpAdd.apply(y, h, B, reuse_y)  # type: ignore[no-any-return]
    return _up_add(y, h, B.to(h.dtype), reuse_y)


class _Down(torch.autograd.Function):
    """h = s (x * m) A^T with A = [A_1; ...; A_n], m the mask, s its scale; h is handed out in n parts.

    With dh = dL/dh, (tokens, rank):  dL/dA = s dh^T (x * m);  dL/dx = (dh s A) * m.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, *As: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        need_x, need_A = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        ctx.dtype, ctx.scale = _product_dtype(x, As[0]), masks.keep_scale(dropout)
        ctx.x_like, ctx.A_dtype, ctx.ranks = (x.shape, x.dtype), As[0].dtype, _ranks(As)
        ctx.set_materialize_grads(False)
        mask = masks.draw(x, dropout) if dropout else None
        ctx.save_for_backward(x if need_A else None, mask, *(A if need_x else None for A in As))
        return _down(x, mask, _joined(As, ctx.scale, ctx.dtype)).split(ctx.ranks, dim=1)

    @staticmethod
    def backward(ctx: Any, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mask, *As = _saved(ctx, dhs)
        need_x, need_A = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        asked = [i for i, dh in enumerate(dhs) if dh is not None]  # linears that did run
        if not asked:
            return (None,) * (2 + len(As))
        dh = _cat([dhs[i] for i in asked], dim=1)  # type: ignore[misc]
        A = _joined([As[i] for i in asked], ctx.scale, ctx.dtype) if need_x else None
        need_dA = any(need_A[i] for i in asked)
        # With grad mode on, this backward is itself differentiated: nothing in place.
        slopes = _slopes_twice if torch.is_grad_enabled() else _slopes
        dA, dx = slopes(dh, x if need_dA else None, A, mask, ctx)
        dAs: list[Tensor | None] = [None] * len(As)
        if dA is not None:
            dA = dA.to(ctx.A_dtype) if mask is None else dA.to(ctx.A_dtype) * ctx.scale
            for i, part in zip(asked, dA.split([ctx.ranks[i] for i in asked]), strict=True):
                dAs[i] = part if need_A[i] else None
        return dx, None, *dAs


def _saved(ctx: Any, dhs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What `ctx` saved. After a backward through some of the linears alone, `ctx` keeps it for the others.

    They are one node of the graph, which autograd empties when it has been gone through; linears that went down alone
    would be a node each.
    """
    tensors, versions = getattr(ctx, "kept", None) or (ctx.saved_tensors, None)
    if versions is not None and versions != _versions(tensors):
        raise RuntimeError("an adapted linear's input or factor was changed in place between two backward passes.")
    ctx.waiting = getattr(ctx, "waiting", set(range(len(dhs)))) - {i for i, dh in enumerate(dhs) if dh is not None}
    ctx.kept = (tensors, _versions(tensors)) if ctx.waiting else None
    return tensors


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None]


class _UpAdd(torch.autograd.Function):
    """out = y + h B^T; with g = dL/dout, (tokens, d_out):  dL/dy = g;  dL/dh = g B;  dL/dB = (h^T g)^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, reuse_y: bool) -> Tensor:  # type: ignore[override]
        _, need_h, need_B, _ = ctx.needs_input_grad
        ctx.dtype, ctx.B_dtype = h.dtype, B.dtype
        ctx.save_for_backward(h if need_B else None, B if need_h else None)
        return _up_add(y, h, B.to(h.dtype), reuse_y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_y, need_h, need_B, _ = ctx.needs_input_grad
        h, B = ctx.saved_tensors
        rows = _flat(g).to(ctx.dtype)
        dh = rows @ B.to(ctx.dtype) if need_h else None
        dB = (h.T @ rows).T.to(ctx.B_dtype) if need_B else None
        return g if need_y else None, dh, dB, None


def _down(x: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    """(x * m) A^T, (tokens, rank), in A's dtype."""
    if _fits_one_part(x, mask, A.dtype):
        return _dropped(x, mask, A.dtype) @ A.T
    h = A.new_empty(x.numel() // x.shape[-1], A.shape[0])
    for rows, part, _ in _parts(x, mask, A.dtype):
        torch.mm(part, A.T, out=h[rows])
    return h


def _up_add(y: Tensor, h: Tensor, B: Tensor, reuse_y: bool) -> Tensor:
    """y + h B^T in y's dtype and shape. Never a view: autograd lets nobody change a Function's view in place."""
    if y.dtype != B.dtype or torch._C._len_torch_dispatch_stack():
        # A mode may keep what it sees, as selective checkpointing does: nothing in place.
        return torch.add(y, (h @ B.T).view(y.shape)).to(y.dtype)
    if reuse_y and y.is_contiguous():
        # detach() shares y's version counter: had somebody saved y for a backward, that would raise there.
        out = y.detach()
        _flat(out).addmm_(h, B.T)
        return out
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    torch.addmm(_flat(y), h, B.T, out=_flat(out))
    return out


def _slopes(
    dh: Tensor, x: Tensor | None, A: Tensor | None, mask: Tensor | None, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    """dh^T (x * m), (rank, d_in), and (dh A) * m in x's shape and dtype; None for the one whose factor is None."""
    shape, dtype = ctx.x_like
    if mask is None or x is None or A is None or _fits_one_part(x, mask, dh.dtype):
        dA = None
        if x is not None and not _fits_one_part(x, mask, dh.dtype):
            dA = dh.new_zeros(dh.shape[1], shape[-1])
            for rows, part, _ in _parts(x, mask, dh.dtype):
                dA.addmm_(dh[rows].T, part)
        elif x is not None:
            dA = dh.T @ _dropped(x, mask, dh.dtype)
        if A is None:
            return dA, None
        dx = dh @ A
        return dA, (dx if mask is None else masks.apply(dx, mask, in_place=True)).view(shape).to(dtype)
    # Both in one pass, so that a part of the mask is unpacked once and a part of dL/dx is masked in the cache.
    dA, dx = dh.new_zeros(dh.shape[1], shape[-1]), dh.new_empty(dh.shape[0], shape[-1])
    for rows, part, kept in _parts(x, mask, dh.dtype):
        dA.addmm_(dh[rows].T, part)
        torch.mm(dh[rows], A, out=dx[rows]).mul_(kept)  # type: ignore[arg-type]
    return dA, dx.view(shape).to(dtype)


def _slopes_twice(
    dh: Tensor, x: Tensor | None, A: Tensor | None, mask: Tensor | None, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    """`_slopes` from differentiable operations."""
    shape, dtype = ctx.x_like
    dA = None if x is None else dh.T @ _dropped(x, mask, dh.dtype)
    if A is None:
        return dA, None
    dx = dh @ A
    return dA, (dx if mask is None else masks.apply(dx, mask)).view(shape).to(dtype)


def _fits_one_part(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> bool:
    # Parts save a copy's trip through memory; without a copy, on other devices, and where adding up the
    # parts' products would round more often (half precision), x is taken whole.
    no_copy = mask is None and x.dtype == dtype
    exact = dtype in (torch.float32, torch.float64)
    return no_copy or not exact or x.device.type != "cpu" or x.numel() * dtype.itemsize <= _PART


def _parts(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """x * m in ``dtype``, some rows at a time: which rows, their part of it (until the next is asked for), and of m."""
    x = _flat(x)
    rows = max(1, _PART // (8 * x.shape[-1] * dtype.itemsize)) * 8  # whole bytes of the mask
    buffer = x.new_empty(rows, x.shape[-1], dtype=dtype)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows].to(dtype)
        kept = None if mask is None else masks.kept(mask, start * x.shape[-1], part.numel()).view(part.shape)
        yield (
            slice(start, start + rows),
            part if kept is None else torch.mul(part, kept, out=buffer[: part.shape[0]]),
            kept,
        )


def _dropped(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = _flat(x.to(dtype))
    return x if mask is None else masks.apply(x, mask)


def _joined(As: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """[A_1; ...; A_n] times the scale, which goes to the small factor, before rounding to a shorter dtype."""
    A = _cat(As)
    return (A if scale == 1 else A * scale).to(dtype)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [A.shape[0] for A in As]


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


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
