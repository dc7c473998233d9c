"""The parts of `product` from torch's operations: for every device and dtype.

A dropped-out copy of x is made in parts that fit a processor's cache. `triton_product` has functions of the same names.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ziggurat.lowrank import mask as masks

_PART = 1 << 21  # bytes of x converted or masked at a time on a CPU
_EXACT = (torch.float32, torch.float64)

draw = masks.draw


class Like(NamedTuple):
    """The form of gradients: dL/dx has x's shape and dtype, dL/dA has A's dtype.

    `x_is_new`: x is made again for the gradients, so nobody else reads it and its memory may be used.
    """

    shape: torch.Size
    dtype: torch.dtype
    A_dtype: torch.dtype
    x_is_new: bool


def kept(mask: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """1 for each entry of an x of this shape that the mask keeps, and 0 for the others."""
    return masks.kept(mask, 0, shape.numel()).view(shape)


def down(x: Tensor, mask: Tensor | None, As: Sequence[Tensor], dropout: float, dtype: torch.dtype) -> Tensor:
    """h = s (x * m) A^T for A = [A_1; ...; A_n], the mask m and its scale s: (tokens, sum of the ranks) in dtype."""
    A = _joined(As, masks.keep_scale(dropout), dtype)
    if _fits_one_part(x, mask, dtype):
        return thin(dropped(x, mask, dtype), A)
    transposed = A.new_empty(A.shape[0], x.numel() // x.shape[-1])
    for rows, part in _parts(x, mask, dtype):
        torch.mm(A, part.T, out=transposed[:, rows])
    return transposed.T


def down_gradients(
    dh: Tensor,
    x: Tensor | None,
    like: Like,
    mask: Tensor | None,
    As: Sequence[Tensor] | None,
    dropout: float,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dA = s dh^T (x * m), (rank, d_in), and dL/dx = s (dh A) * m; None without x, and without the As.

    `into`: (tokens, d_in), of dh's dtype, to which dL/dx is added, and which then holds the sum.
    """
    scale = masks.keep_scale(dropout)
    A = None if As is None else _joined(As, scale, dh.dtype)
    dA = dx = None
    if x is not None and not _fits_one_part(x, mask, dh.dtype):
        # Both in one pass, so that a part of x and one of dL/dx are masked in the cache.
        width = like.shape[-1]
        dA = dh.new_zeros(dh.shape[1], width)
        dx = None if A is None else dh.new_empty(dh.shape[0], width) if into is None else into
        for rows, part in _parts(x, mask, dh.dtype, like.x_is_new):
            dA.addmm_(dh[rows].T, part)
            if A is not None and dx is not None:
                _masked_product(dh[rows], A, mask, rows.start * width, dx[rows], adds=into is not None)
    else:
        dA = None if x is None else dh.T @ dropped(x, mask, dh.dtype, like.x_is_new)
        if A is not None and into is not None:
            _masked_product(dh, A, mask, 0, into, adds=True)
            dx = into
        elif A is not None:
            dx = dh @ A
            dx = dx if mask is None else masks.apply(dx, mask, out=dx)
    if dA is not None:
        dA = dA.to(like.A_dtype) if scale == 1 else dA.to(like.A_dtype) * scale
    return dA, None if dx is None else dx.view(like.shape).to(like.dtype)


def _masked_product(dh: Tensor, A: Tensor, mask: Tensor | None, start: int, out: Tensor, adds: bool) -> None:
    """out = (dh A) * m, or out += that, with m from its entry number `start` on."""
    if not adds:
        torch.mm(dh, A, out=out)
        if mask is not None:
            masks.apply(out, mask, start=start, out=out)
    elif mask is None:
        out.addmm_(dh, A)
    elif masks.is_numbered(mask):  # entries that are few: what they held is put back
        entries, where = out.view(-1), masks.dropped(mask, start, out.numel())
        held = entries[where]
        out.addmm_(dh, A)
        entries.index_copy_(0, where, held)
    else:
        product = dh @ A
        out += masks.apply(product, mask, start=start, out=product)


def up_add(y: Tensor, h: Tensor, B: Tensor, reuse_y: bool) -> Tensor:
    """y + h B^T in y's dtype and shape, in y's memory if `reuse_y`. Never a view: autograd forbids changing a
    Function's view in place."""
    B = B.to(h.dtype)
    if y.dtype != B.dtype or torch._C._len_torch_dispatch_stack():
        # A dispatch mode may keep tensors, as selective checkpointing does: nothing in place.
        return torch.add(y, (h @ B.T).view(y.shape)).to(y.dtype)
    if reuse_y and y.is_contiguous():
        # detach() shares y's version counter: if y was saved for a backward, that backward raises.
        out = y.detach()
        flat(out).addmm_(h, B.T)
        return out
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    torch.addmm(flat(y), h, B.T, out=flat(out))
    return out


def thin(rows: Tensor, factor: Tensor) -> Tensor:
    """rows factor^T, (tokens, rank), for rows (tokens, d) and a factor (rank, d).

    On a processor computed as (factor rows^T)^T: a BLAS fills its vectors along the tokens then, not along the rank,
    which takes half the time unless the rank is a multiple of 16.
    """
    if rows.device.type == "cpu" and rows.dtype in _EXACT:
        return (factor @ rows.T).T
    return rows @ factor.T


def flat(t: Tensor) -> Tensor:
    """t as (tokens, d)."""
    return t.reshape(-1, t.shape[-1])


def dropped(x: Tensor, mask: Tensor | None, dtype: torch.dtype, x_is_new: bool = False) -> Tensor:
    """x * m, (tokens, d), in x's memory if it is new."""
    rows = flat(x.to(dtype))
    if mask is None:
        return rows
    is_new = (x_is_new or rows.dtype != x.dtype) and rows.is_contiguous()
    return masks.apply(rows, mask, out=rows if is_new else None)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def beside(tensors: Sequence[Tensor]) -> Tensor:
    """One beside the other, (tokens, sum of the ranks), in the memory layout that they have: see `thin`."""
    if len(tensors) == 1 or not tensors[0].T.is_contiguous():
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), 1)
    return torch.cat([tensor.T for tensor in tensors]).T


def _joined(As: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """[A_1; ...; A_n] times the scale, which goes to the small factor, before rounding to a shorter dtype."""
    A = joined(As)
    return (A if scale == 1 else A * scale).to(dtype)


def _fits_one_part(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> bool:
    # Parts save a copy's trip through memory; without a copy, on other devices, and where adding up the
    # parts' products would round more often (half precision), x is taken whole.
    no_copy = mask is None and x.dtype == dtype
    return no_copy or dtype not in _EXACT or x.device.type != "cpu" or x.numel() * dtype.itemsize <= _PART


def _parts(
    x: Tensor, mask: Tensor | None, dtype: torch.dtype, x_is_new: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """x * m in ``dtype``, some rows at a time: which rows, and their part of it (until the next is asked for)."""
    x = flat(x)
    count = max(1, _PART // (8 * x.shape[-1] * dtype.itemsize)) * 8  # whole bytes of the mask
    in_place = mask is None or x_is_new or x.dtype != dtype
    buffer = None if in_place else x.new_empty(count, x.shape[-1], dtype=dtype)
    for start in range(0, x.shape[0], count):
        rows = slice(start, start + count)
        part = x[rows].to(dtype)
        if mask is not None:
            out = buffer[: len(part)] if buffer is not None else part if part.is_contiguous() else None
            part = masks.apply(part, mask, start=start * x.shape[-1], out=out)
        yield rows, part
