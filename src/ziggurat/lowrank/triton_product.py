"""The low-rank addition on CUDA by the kernels of `triton_kernels`: dropout, scale and sum cost no pass of their own.

Forward: two launches, and one that draws a seed if there is dropout. Kept for the backward: x itself, the
(tokens, rank) product and the seed. Backward: four launches and the sums of their parts.
"""

from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ziggurat.lowrank import mask as masks
from ziggurat.lowrank import triton_kernels as kernels

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_MAX_RANK = 128  # above it a tile of (rank, columns) sums no longer fits the registers
_PROGRAMS = 256  # enough to fill a large GPU about twice


def suits(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels should take these, with the products in ``dtype``.

    Half-precision products only: float32 ones would not run on tensor cores, and torch's are better at it.
    """
    dtypes_known = all(t.dtype in _DTYPES for t in (y, x, A, B)) and dtype in (torch.float16, torch.bfloat16)
    # The random numbers' counter, one for 8 entries, has 31 bits.
    countable = x.numel() < 2**33
    return dtypes_known and 1 <= A.shape[0] <= _MAX_RANK and x.numel() > 0 and y.numel() > 0 and countable


@cache
def runs_on(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of compute capability 8.0 (A100) or later."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def fused_low_rank_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float, dtype: torch.dtype, reuse_y: bool
) -> Tensor:
    """`product.low_rank_add` with the products in ``dtype``, for what `suits`."""
    return _FusedLowRankAdd.apply(y, x, A, B, dropout, dtype, reuse_y)  # type: ignore[no-any-return]


def keep_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """The mask that ``seed`` stands for in this x, as booleans of its shape."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    tokens, columns = _rows(x).shape
    _launch(kernels.write_mask, (_tiles(tokens), _blocks(columns)), out, seed, tokens, columns, *_dropping(x, dropout))
    return out.bool()


class _FusedLowRankAdd(torch.autograd.Function):
    """As `product.down` and `up_add` in one, with h = (x * m) (s A)^T as (tokens, rank) and the mask m as its seed."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float, dtype: torch.dtype, reuse_y: bool
    ) -> Tensor:
        _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        # Drawn on x's device: nothing waits for the GPU, and a captured graph draws anew in each replay.
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_().add_(masks.rank()) if dropout else None
        ctx.dropout, ctx.dtype, ctx.x_like = dropout, dtype, (x.shape, x.dtype)
        ctx.A_dtype, ctx.B_dtype = A.dtype, B.dtype
        # detach() shares y's version counter: had somebody saved y for a backward, that would raise there.
        out = y.detach() if reuse_y and y.is_contiguous() else torch.empty(y.shape, dtype=y.dtype, device=y.device)
        h = _up(_down(x, A, dropout, seed, dtype), B, out, masks.keep_scale(dropout), dtype, add=y)
        ctx.save_for_backward(
            x if need_A or need_B else None,
            h if need_B else None,
            seed,
            A if need_x or need_B else None,
            B if need_x or need_A else None,
        )
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        x, h, seed, A, B = ctx.saved_tensors
        if torch.is_grad_enabled():  # this backward is itself differentiated
            dx, dA, dB = _plain_backward(ctx, g, x, seed, A, B)
            return g if need_y else None, dx, dA, dB, None, None, None
        dx = dA = dB = None
        if need_B:
            dB = _outer(h, g, 0.0, None, ctx.dtype).T.to(ctx.B_dtype)
        if need_x or need_A:
            parts = _down(g, B.T, 0.0, None, ctx.dtype)
            scale = masks.keep_scale(ctx.dropout)
            if need_x:
                dx = torch.empty(ctx.x_like[0], dtype=ctx.x_like[1], device=g.device)
                dh = _up(parts, A.T, dx, scale, ctx.dtype, dropout=ctx.dropout, seed=seed)
            else:
                dh = (parts.sum(0) * scale).to(ctx.dtype)
            if need_A:
                dA = _outer(dh, x, ctx.dropout, seed, ctx.dtype).to(ctx.A_dtype)
        return g if need_y else None, dx, dA, dB, None, None, None


def _plain_backward(
    ctx: Any, g: Tensor, x: Tensor | None, seed: Tensor | None, A: Tensor | None, B: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dx, dA and dB from differentiable operations."""
    _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
    dtype, (x_shape, x_dtype) = ctx.dtype, ctx.x_like
    kept: Tensor | float = 1.0
    if seed is not None:
        like = x if x is not None else torch.empty(x_shape, device="meta")
        mask = keep_mask(like.new_empty(x_shape, device=seed.device), ctx.dropout, seed)
        kept = mask.to(dtype) * masks.keep_scale(ctx.dropout)
    rows = g.reshape(-1, g.shape[-1]).to(dtype)
    dx = dA = dB = None
    if x is not None:
        dropped = (x.to(dtype) * kept).reshape(-1, x_shape[-1])
    if need_B:
        dB = (rows.T @ (dropped @ A.to(dtype).T)).to(ctx.B_dtype)  # type: ignore[union-attr]
    if need_x or need_A:
        dh = rows @ B.to(dtype)  # type: ignore[union-attr]
        if need_A:
            dA = (dh.T @ dropped).to(ctx.A_dtype)
        if need_x:
            dx = ((dh @ A.to(dtype)).view(x_shape) * kept).to(x_dtype)  # type: ignore[union-attr]
    return dx, dA, dB


def _down(x: Tensor, w: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Parts of (x * m) w^T, (splits, tokens, rank) in float32, for w (rank, d): to be summed over the first."""
    x = _rows(x)
    (tokens, columns), rank = x.shape, w.shape[0]
    splits, per_split = _splits(columns, kernels.WIDTH, _tiles(tokens))
    parts = torch.empty(splits, tokens, rank, dtype=torch.float32, device=x.device)
    _launch(
        kernels.down, (_tiles(tokens), splits), x, x.stride(0), w, *w.stride(), parts, seed,
        tokens, columns, rank, *_dropping(x, dropout), per_split,
        DROP=dropout > 0, DTYPE=_DTYPES[dtype], RANK=_padded(rank),
    )  # fmt: skip
    return parts


def _up(
    parts: Tensor,
    w: Tensor,
    out: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    add: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Fill out (..., d) with ``add + h w^T`` or ``(h w^T) * m`` for w (d, rank); returns h = scale sum(parts)."""
    splits, tokens, rank = parts.shape
    columns = out.shape[-1]
    add = None if add is None else _rows(add)
    h = torch.empty(tokens, rank, dtype=dtype, device=out.device)
    _launch(
        kernels.up, (_tiles(tokens), _blocks(columns)), parts, w, *w.stride(), add, 0 if add is None else add.stride(0),
        out, h, seed, tokens, columns, rank, *_dropping(out, dropout), splits, scale,
        ADD=add is not None, DROP=dropout > 0, DTYPE=_DTYPES[dtype], RANK=_padded(rank),
    )  # fmt: skip
    return h


def _outer(h: Tensor, x: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """h^T (x * m), (rank, d) in float32."""
    x = _rows(x)
    (tokens, columns), rank = x.shape, h.shape[1]
    splits, per_split = _splits(tokens, kernels.TOKENS, _blocks(columns))
    parts = torch.empty(splits, rank, columns, dtype=torch.float32, device=x.device)
    _launch(
        kernels.outer, (_blocks(columns), splits), h, x, x.stride(0), parts, seed,
        tokens, columns, rank, *_dropping(x, dropout), per_split,
        DROP=dropout > 0, DTYPE=_DTYPES[dtype], RANK=_padded(rank),
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


def _launch(kernel: Any, grid: tuple[int, int], *args: Any, **constants: Any) -> None:
    device = next(t for t in args if isinstance(t, Tensor))
    with torch.cuda.device_of(device):
        # Two tiles ahead fit the shared memory of small GPUs (99 KiB) up to rank 64, one ahead beyond.
        stages = 2 if constants.get("RANK", 0) > 64 else 3
        kernel[grid](*args, **constants, TOKENS=kernels.TOKENS, WIDTH=kernels.WIDTH, num_stages=stages)


def _splits(length: int, tile: int, programs: int) -> tuple[int, int]:
    """Into how many parts to split a sum over ``length``, and how long each is: a multiple of the tile."""
    tiles = _ceil(length, tile)
    splits = max(1, min(tiles, _PROGRAMS // programs))
    per_split = _ceil(tiles, splits)
    return _ceil(tiles, per_split), per_split * tile


def _dropping(x: Tensor, dropout: float) -> tuple[int, int]:
    """Counters per row of x, and the threshold of 16 random bits below which an entry is dropped."""
    return _ceil(x.shape[-1], 8), masks.threshold(dropout)


def _tiles(tokens: int) -> int:
    return _ceil(tokens, kernels.TOKENS)


def _ceil(size: int, part: int) -> int:
    """How many parts of a size cover it. Triton's own is typed for the values of its kernels."""
    return -(-size // part)


def _blocks(columns: int) -> int:
    return _ceil(columns, kernels.WIDTH)


def _padded(rank: int) -> int:
    # The tensor cores' products want 16 at least, and tiles are powers of two.
    return max(16, 1 << (rank - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """x as (tokens, d), each row without gaps."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
