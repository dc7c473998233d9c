"""`plain_product`'s functions by the kernels of `triton_kernels`: dropout and scale need no extra pass.

A dropout mask is a seed here. Each passes over (tokens, d) once: one launch, and one that adds up parts where a sum had
to be split to fill the GPU.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ziggurat.lowrank import mask as masks
from ziggurat.lowrank import triton_kernels as kernels
from ziggurat.lowrank.plain_product import Like, joined

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_MAX_RANK = 128  # above it a tile of (rank, columns) sums does not fit the registers
_PROGRAMS = 256  # enough to fill a large GPU about twice
_ADDED = 1024  # sums that one program adds up
_ENOUGH = 2**22  # entries of (tokens, d) from which on the kernels are chosen, see `suits`


def suits(x: Tensor, As: Sequence[Tensor], dropout: float, dtype: torch.dtype) -> bool:
    """Whether the kernels should take dropout(x) to the ranks of the As together, with the products in ``dtype``.

    They save the passes of dropout and nothing else: without it torch moves as many bytes. To launch them takes a
    processor longer, so they win where a GPU is at work for longer than that: from 4,194,304 entries of x on, 2,048
    tokens of 2,048; within a CUDA graph, which has no launches, at every size (benchmarks/roofline.md). Half-precision
    products only: float32 ones would not run on tensor cores. The width has to be a multiple of 16, so that rows start
    at whole 32 bytes; else the kernels would move every entry by itself.
    """
    rank = sum(A.shape[0] for A in As)
    tokens = x.numel() // max(1, x.shape[-1])
    enough = x.numel() >= _ENOUGH or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    fits = x.numel() > 0 and x.shape[-1] % 16 == 0 and 1 <= rank <= _MAX_RANK
    # The random numbers' counter, one for 8 entries, and offsets into (tokens, rank) and (rank, d) have 31 bits.
    countable = x.numel() < 2**33 and rank * max(tokens, x.shape[-1]) < 2**31
    dtypes_known = all(t.dtype in _DTYPES for t in (x, *As)) and dtype in (torch.float16, torch.bfloat16)
    return dropout > 0 and enough and fits and countable and dtypes_known


@cache
def runs_on(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of compute capability 8.0 (A100) or later."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def draw(x: Tensor, dropout: float) -> Tensor:
    """A seed, which stands for a new mask of x. Drawn on x's device: nothing waits for the GPU, and a captured graph
    draws anew in each replay."""
    return torch.empty(1, dtype=torch.int64, device=x.device).random_().add_(masks.rank())


def kept(mask: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """The mask that the seed stands for in an x of this shape, as booleans."""
    out = torch.empty(shape, dtype=torch.int8, device=mask.device)
    tokens, columns = _rows(out).shape
    tile = kernels.Tile(kernels.TOKENS, kernels.WIDTH, num_warps=4)
    grid = _ceil(tokens, tile.TOKENS), _ceil(columns, tile.WIDTH)
    _launch(kernels.write_mask, grid, tile, out, mask, tokens, columns, *_dropping(out, dropout))
    return out.bool()


def down(x: Tensor, mask: Tensor | None, As: Sequence[Tensor], dropout: float, dtype: torch.dtype) -> Tensor:
    """h = s (x * m) A^T for A = [A_1; ...; A_n], the mask m and its scale s: (tokens, sum of the ranks) in dtype."""
    return _down(x, joined(As), mask, dropout, dtype)


def down_gradients(
    dh: Tensor, x: Tensor | None, like: Like, mask: Tensor | None, As: Sequence[Tensor] | None, dropout: float
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dA = s dh^T (x * m), (rank, d_in), and dL/dx = s (dh A) * m; None without x, and without the As."""
    dx = None
    if As is not None:
        dx = torch.empty(like.shape, dtype=like.dtype, device=dh.device)
        _up(dh, joined(As), dx, dropout, mask)
    return None if x is None else _outer(dh, x, dropout, mask).to(like.A_dtype), dx


def _down(x: Tensor, w: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """s (x * m) w^T, (tokens, rank), for w (rank, d)."""
    x = _rows(x)
    (tokens, columns), rank = x.shape, w.shape[0]
    tile = kernels.tile("down", rank)
    tiles = _ceil(tokens, tile.TOKENS)
    splits, per_split = _splits(columns, tile.WIDTH, tiles)
    w = _factor(w, rank, dtype)
    out = torch.empty(splits, tokens, rank, dtype=dtype if splits == 1 else torch.float32, device=x.device)
    _launch(
        kernels.down, (tiles, splits), tile, x, x.stride(0), w, w.stride(0), out, seed,
        tokens, columns, rank, *_dropping(x, dropout), masks.keep_scale(dropout), per_split,
        DROP=dropout > 0, DTYPE=_DTYPES[dtype], RANK=kernels.padded(rank),
    )  # fmt: skip
    return _added(out, dtype)


def _up(h: Tensor, w: Tensor, out: Tensor, dropout: float, seed: Tensor | None) -> None:
    """Fill out (..., d) with s (h w) * m, for w (rank, d)."""
    tokens, rank = h.shape
    columns = out.shape[-1]
    h = h if h.stride(1) == 1 else h.contiguous()
    tile = kernels.tile("up", rank)
    tiles = _ceil(tokens, tile.TOKENS)
    splits, per_split = _splits(columns, tile.WIDTH, tiles)
    w = _factor(w, rank, h.dtype)
    _launch(
        kernels.up, (tiles, splits), tile, h, h.stride(0), w, w.stride(0), out, seed,
        tokens, columns, rank, *_dropping(out, dropout), masks.keep_scale(dropout), per_split,
        DROP=dropout > 0, DTYPE=_DTYPES[h.dtype], RANK=kernels.padded(rank),
    )  # fmt: skip


def _outer(h: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """s h^T (x * m), (rank, d) in float32."""
    x = _rows(x)
    h = h if h.stride(1) == 1 else h.contiguous()
    (tokens, columns), rank = x.shape, h.shape[1]
    tile = kernels.tile("outer", rank)
    blocks = _ceil(columns, tile.WIDTH)
    splits, per_split = _splits(tokens, tile.TOKENS, blocks)
    out = torch.empty(splits, rank, columns, dtype=torch.float32, device=x.device)
    _launch(
        kernels.outer, (blocks, splits), tile, h, h.stride(0), x, x.stride(0), out, seed,
        tokens, columns, rank, *_dropping(x, dropout), masks.keep_scale(dropout), per_split,
        DROP=dropout > 0, DTYPE=_DTYPES[h.dtype], RANK=kernels.padded(rank),
    )  # fmt: skip
    return _added(out, torch.float32)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts' sum over the first dimension."""
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    grid = (_ceil(out.numel(), _ADDED),)
    _launch(kernels.add_parts, grid, None, parts, out, out.numel(), parts.shape[0], WIDTH=_ADDED)
    return out


def _factor(w: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """w with rows without gaps; converted where its rank is wide, since each tile of tokens reads it again."""
    w = w if w.stride(1) == 1 else w.contiguous()
    return w.to(dtype) if rank > kernels.NARROW else w


def _launch(kernel: Any, grid: tuple[int, ...], tile: kernels.Tile | None, *args: Any, **constants: Any) -> None:
    device = next(t for t in args if isinstance(t, Tensor))
    with torch.cuda.device_of(device):
        kernel[grid](*args, **constants, **({} if tile is None else tile._asdict()))


def _splits(length: int, tile: int, programs: int) -> tuple[int, int]:
    """Into how many parts to split a loop over ``length``, and how long each is: a multiple of the tile."""
    tiles = _ceil(length, tile)
    splits = max(1, min(tiles, _PROGRAMS // programs))
    per_split = _ceil(tiles, splits)
    return _ceil(tiles, per_split), per_split * tile


def _dropping(x: Tensor, dropout: float) -> tuple[int, int]:
    """Counters per row of x, and the threshold of 16 random bits below which an entry is dropped."""
    return _ceil(x.shape[-1], 8), masks.threshold(dropout)


def _ceil(size: int, part: int) -> int:
    """The number of parts that cover a size. Triton's own is typed for the values of its kernels."""
    return -(-size // part)


def _rows(x: Tensor) -> Tensor:
    """x as (tokens, d), each row without gaps, and at a whole 32 bytes if its width is a multiple of 16."""
    x = x.reshape(-1, x.shape[-1])
    aligned = x.shape[1] % 16 != 0 or (x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0)
    return x if aligned and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)
