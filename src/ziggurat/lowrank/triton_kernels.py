"""Triton kernels for a factor pair on many tokens: down to the rank, up from it, and the factors' gradients.

Each reads or writes (tokens, d) once and nothing else of that size. Dropout is drawn inside: entry (t, k) is
dropped if 16 bits of Philox4x32-7 at counter ``t * ceil(d / 8) + k // 8`` are below a threshold, so a seed says
the whole mask, whatever the tiles, and one draw of 128 bits serves 8 neighbours.

The sums over d or over the tokens are split among programs, each writing its own float32 part: what adds them
up does so in a fixed order, hence the same result each time. Sizes that are no multiple of a tile are masked.
"""

import triton
import triton.language as tl

TOKENS = 64  # tokens per tile
WIDTH = 64  # columns per tile, a multiple of 8


@triton.jit
def _keep(seed, rows, first, groups, threshold, WIDTH: tl.constexpr):
    """Which entries of the tile (rows, first .. first + WIDTH) are kept; first is a multiple of 8."""
    group = first // 8 + tl.arange(0, WIDTH // 8)
    numbers = rows[:, None] * groups + group[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed), numbers, n_rounds=tl.constexpr(7))  # pyright: ignore[reportGeneralTypeIssues]
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d)).to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["tokens", "threshold"])
def down(
    x, x_row, w, w_rank, w_col, parts, seed, tokens, columns, rank, groups, threshold, per_split,
    DROP: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """parts[s, t, r] = sum over the columns k of split s of (x * keep)[t, k] w[r, k]."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    inside = rows < tokens
    x += rows.to(tl.int64)[:, None] * x_row
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for first in range(split * per_split, min((split + 1) * per_split, columns), WIDTH):
        cols = first + tl.arange(0, WIDTH)
        tile = tl.load(x + cols[None, :], mask=inside[:, None] & (cols < columns)[None, :], other=0.0)
        if DROP:
            tile = tl.where(_keep(seed, rows, first, groups, threshold, WIDTH), tile, 0.0)
        w_at = w + ranks[None, :] * w_rank + cols.to(tl.int64)[:, None] * w_col
        factor = tl.load(w_at, mask=(ranks < rank)[None, :] & (cols < columns)[:, None], other=0.0)
        total = tl.dot(tile.to(DTYPE), factor.to(DTYPE), total, input_precision="ieee")
    at = parts + (split.to(tl.int64) * tokens + rows[:, None]) * rank + ranks[None, :]
    tl.store(at, total, mask=inside[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["tokens", "threshold"])
def up(
    parts, w, w_col, w_rank, y, y_row, out, h, seed, tokens, columns, rank, groups, threshold, splits, scale,
    ADD: tl.constexpr, DROP: tl.constexpr, DTYPE: tl.constexpr,
    RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """h = scale sum_s parts[s], (tokens, rank); out[t, n] = y[t, n] + h[t] . w[n], or keep[t, n] h[t] . w[n]."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * WIDTH
    cols = first + tl.arange(0, WIDTH)
    ranks = tl.arange(0, RANK)
    inside = rows < tokens
    small = inside[:, None] & (ranks < rank)[None, :]
    small_at = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    part_at = parts + small_at
    for _ in range(splits):
        total += tl.load(part_at, mask=small, other=0.0)
        part_at += tokens * rank
    rounded = (total * scale).to(DTYPE)
    if first == 0:
        tl.store(h + small_at, rounded, mask=small)
    w_at = w + cols.to(tl.int64)[None, :] * w_col + ranks[:, None] * w_rank
    factor = tl.load(w_at, mask=(cols < columns)[None, :] & (ranks < rank)[:, None], other=0.0)
    tile = tl.dot(rounded, factor.to(DTYPE), input_precision="ieee")
    large = inside[:, None] & (cols < columns)[None, :]
    if ADD:
        tile += tl.load(y + rows.to(tl.int64)[:, None] * y_row + cols[None, :], mask=large, other=0.0).to(tl.float32)
    if DROP:
        tile = tl.where(_keep(seed, rows, first, groups, threshold, WIDTH), tile, 0.0)
    tl.store(out + rows.to(tl.int64)[:, None] * columns + cols[None, :], tile, mask=large)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def outer(
    h, x, x_row, parts, seed, tokens, columns, rank, groups, threshold, per_split,
    DROP: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """parts[s, r, n] = sum over the tokens t of split s of h[t, r] (x * keep)[t, n]."""
    first = tl.program_id(0) * WIDTH
    split = tl.program_id(1)
    cols = first + tl.arange(0, WIDTH)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((RANK, WIDTH), dtype=tl.float32)
    for start in range(split * per_split, min((split + 1) * per_split, tokens), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        inside = rows < tokens
        far = rows.to(tl.int64)
        tile = tl.load(
            x + far[:, None] * x_row + cols[None, :], mask=inside[:, None] & (cols < columns)[None, :], other=0.0
        )
        if DROP:
            tile = tl.where(_keep(seed, rows, first, groups, threshold, WIDTH), tile, 0.0)
        small = inside[None, :] & (ranks < rank)[:, None]
        factor = tl.load(h + far[None, :] * rank + ranks[:, None], mask=small, other=0.0)
        total = tl.dot(factor.to(DTYPE), tile.to(DTYPE), total, input_precision="ieee")
    at = parts + (split * rank + ranks)[:, None].to(tl.int64) * columns + cols[None, :]
    tl.store(at, total, mask=(ranks < rank)[:, None] & (cols < columns)[None, :])


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
