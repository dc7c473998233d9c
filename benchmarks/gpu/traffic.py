"""What the Triton kernels move and multiply, counted from their launches: for kernel_table.py and roofline.py."""

from typing import NamedTuple

from benchmarks.gpu.bare import triton_product

HALF, SINGLE = 2, 4  # bytes of an activation and of a factor's entry
kernels = triton_product.kernels


class Traffic(NamedTuple):
    """Bytes that the programs of one kernel read and write, which pass the L2 cache, and the least possible: each
    operand read or written once. ``launches`` counts those that
    add up parts and convert factors."""

    moved: float
    least: float
    flops: float
    launches: int


def down(tokens: int, d: int, rank: int) -> Traffic:
    """(tokens, d) times (d, rank)."""
    tile = kernels.tile("down", rank)
    tiles = -(-tokens // tile.TOKENS)
    splits, _ = triton_product._splits(d, tile.WIDTH, tiles)
    out = tokens * rank * HALF
    parts = 2 * splits * tokens * rank * SINGLE if splits > 1 else 0
    moved = tokens * d * HALF + _factor(d, rank, tiles) + parts + out
    return Traffic(
        moved,
        tokens * d * HALF + rank * d * SINGLE + out,
        _flops(tokens, d, rank),
        1 + (splits > 1) + (rank > kernels.NARROW),
    )


def up(tokens: int, d: int, rank: int) -> Traffic:
    """(tokens, rank) times (rank, d)."""
    tile = kernels.tile("up", rank)
    tiles = -(-tokens // tile.TOKENS)
    splits, _ = triton_product._splits(d, tile.WIDTH, tiles)
    wide = tokens * d * HALF
    moved = wide + _factor(d, rank, tiles) + splits * tokens * rank * HALF
    least = wide + rank * d * SINGLE + tokens * rank * HALF
    return Traffic(moved, least, _flops(tokens, d, rank), 1 + (rank > kernels.NARROW))


def outer(tokens: int, d: int, rank: int) -> Traffic:
    """(rank, tokens) times (tokens, d)."""
    tile = kernels.tile("outer", rank)
    blocks = -(-d // tile.WIDTH)
    splits, _ = triton_product._splits(tokens, tile.TOKENS, blocks)
    out = rank * d * SINGLE
    moved = tokens * d * HALF + blocks * tokens * rank * HALF + (1 + 2 * splits * (splits > 1)) * out
    least = tokens * d * HALF + tokens * rank * HALF + out
    return Traffic(moved, least, _flops(tokens, d, rank), 1 + (splits > 1))


def _factor(d: int, rank: int, tiles: int) -> float:
    """A factor as each tile of tokens reads it, after a conversion if the rank is wide."""
    once = rank * d
    return tiles * once * SINGLE if rank <= kernels.NARROW else once * (SINGLE + HALF) + tiles * once * HALF


def _flops(tokens: int, d: int, rank: int) -> float:
    return 2.0 * tokens * d * kernels.padded(rank)
