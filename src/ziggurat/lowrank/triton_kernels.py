"""Triton kernels for many tokens that are dropped out and go down to the rank, and for the gradients of that.

Each reads or writes (tokens, d) once and nothing else of that size. Dropout is drawn inside: entry (t, k) is
dropped if 16 bits of Philox4x32-7 at counter ``t * ceil(d / 8) + k // 8`` are below a threshold, so a seed says
the whole mask, whatever the tiles, and one draw of 128 bits serves 8 neighbours.

The grid is (tiles of the output, splits). A program of a split runs over ``per_split`` columns or tokens. If the sum
runs over these, each split writes its own float32 part, and `add_parts` adds them in a fixed order, hence the same
result each time. Sizes that are no multiple of a tile are masked. Offsets into (tokens, d) have 64 bits, those into
tensors of second size rank have 32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

TOKENS = 64  # tokens per tile
WIDTH = 64  # columns per tile, a multiple of 8
NARROW = 32  # up to this rank factors are converted in the kernels, beyond it before


class Tile(NamedTuple):
    """The tile of a kernel, and its options of compilation."""

    TOKENS: int
    WIDTH: int
    num_warps: int = 8
    num_stages: int = 3  # tiles of a loop in flight, among them the one at work


def tile(kernel: str, rank: int) -> Tile:
    """The tile of `down`, `up` or `outer`: by benchmarks/kernel_table.md, on every GPU without spills, and with a
    quarter of the warps that an SM can hold."""
    if padded(rank) <= 64:
        return Tile(TOKENS, WIDTH)
    wide = {
        "down": Tile(TOKENS, WIDTH // 2),
        "up": Tile(TOKENS, WIDTH, num_stages=2),
        "outer": Tile(TOKENS // 2, WIDTH),
    }
    return wide[kernel]


def padded(rank: int) -> int:
    """The rank of the tiles: the tensor cores' products want 16 at least, and tiles are powers of two."""
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit
def _keep(seed, rows, first, groups, threshold, WIDTH: tl.constexpr):
    """The mask of the kept entries of the tile (rows, first .. first + WIDTH); first is a multiple of 8."""
    group = first // 8 + tl.arange(0, WIDTH // 8)
    numbers = rows[:, None] * groups + group[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed), numbers, n_rounds=tl.constexpr(7))  # pyright: ignore[reportGeneralTypeIssues]
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d)).to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["tokens", "threshold"])
def down(
    x, x_row, w, w_rank, out, seed, tokens, columns, rank, groups, threshold, scale, per_split,
    DROP: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[s, t, r] = scale * sum over the columns k of split s of (x * keep)[t, k] w[r, k]."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    inside = rows < tokens
    x += rows.to(tl.int64)[:, None] * x_row
    w += ranks[None, :] * w_rank
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for first in range(split * per_split, min((split + 1) * per_split, columns), WIDTH):
        cols = first + tl.arange(0, WIDTH)
        tile = tl.load(x + cols[None, :], mask=inside[:, None] & (cols < columns)[None, :], other=0.0)
        if DROP:
            tile = tl.where(_keep(seed, rows, first, groups, threshold, WIDTH), tile, 0.0)
        factor = tl.load(w + cols[:, None], mask=(ranks < rank)[None, :] & (cols < columns)[:, None], other=0.0)
        total = tl.dot(tile.to(DTYPE), factor.to(DTYPE), total, input_precision="ieee")
    out += split.to(tl.int64) * tokens * rank + (rows * rank)[:, None] + ranks[None, :]
    tl.store(out, total * scale, mask=inside[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["tokens", "threshold"])
def up(
    h, h_row, w, w_rank, out, seed, tokens, columns, rank, groups, threshold, scale, per_split,
    DROP: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t, n] = keep[t, n] scale h[t] . w[:, n], for the columns n of a split."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    inside = rows < tokens
    small = tl.load(
        h + (rows * h_row)[:, None] + ranks[None, :], mask=inside[:, None] & (ranks < rank)[None, :], other=0.0
    ).to(DTYPE)
    w += ranks[:, None] * w_rank
    out += rows.to(tl.int64)[:, None] * columns
    for first in range(split * per_split, min((split + 1) * per_split, columns), WIDTH):
        cols = first + tl.arange(0, WIDTH)
        factor = tl.load(w + cols[None, :], mask=(cols < columns)[None, :] & (ranks < rank)[:, None], other=0.0)
        tile = tl.dot(small, factor.to(DTYPE), input_precision="ieee") * scale
        if DROP:
            tile = tl.where(_keep(seed, rows, first, groups, threshold, WIDTH), tile, 0.0)
        tl.store(out + cols[None, :], tile, mask=inside[:, None] & (cols < columns)[None, :])


@triton.jit(do_not_specialize=["tokens", "threshold"])
def outer(
    h, h_row, x, x_row, out, seed, tokens, columns, rank, groups, threshold, scale, per_split,
    DROP: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[s, r, n] = scale * sum over the tokens t of split s of h[t, r] (x * keep)[t, n]."""
    first = tl.program_id(0) * WIDTH
    split = tl.program_id(1)
    cols = first + tl.arange(0, WIDTH)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((RANK, WIDTH), dtype=tl.float32)
    for start in range(split * per_split, min((split + 1) * per_split, tokens), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        inside = rows < tokens
        large = inside[:, None] & (cols < columns)[None, :]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * x_row + cols[None, :], mask=large, other=0.0)
        if DROP:
            tile = tl.where(_keep(seed, rows, first, groups, threshold, WIDTH), tile, 0.0)
        small = inside[None, :] & (ranks < rank)[:, None]
        factor = tl.load(h + (rows * h_row)[None, :] + ranks[:, None], mask=small, other=0.0)
        total = tl.dot(factor.to(DTYPE), tile.to(DTYPE), total, input_precision="ieee")
    at = out + (split * rank + ranks)[:, None] * columns + cols[None, :]
    tl.store(at, total * scale, mask=(ranks < rank)[:, None] & (cols < columns)[None, :])


@triton.jit(do_not_specialize=["splits"])
def add_parts(parts, out, size, splits, WIDTH: tl.constexpr):
    """out[i] = sum_s parts[s, i]."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += size
    tl.store(out + at, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def write_mask(
    out, seed, tokens, columns, groups, threshold, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The mask that the other kernels draw, as bytes."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * WIDTH
    cols = first + tl.arange(0, WIDTH)
    keep = _keep(seed, rows, first, groups, threshold, WIDTH)
    at = out + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(at, keep.to(tl.int8), mask=(rows < tokens)[:, None] & (cols < columns)[None, :])
