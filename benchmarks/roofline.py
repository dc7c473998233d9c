"""One adapted linear layer, forward and backward, counted: bytes, FLOPs and launches, and the time that they allow.

    python -m benchmarks.roofline > benchmarks/roofline.md

Nothing is measured. A kernel takes as long as its slowest resource: memory, L2 cache (kernels that read a factor
again), tensor cores, or the issue of its instructions (Triton's, counted in kernel_table.jsonl). The layer takes the
sum of its kernels, or the processor's time to launch them if that is longer; a CUDA graph has no such time.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.gpu import traffic  # noqa: E402


class Card(NamedTuple):
    """Its maker's TB/s of memory, dense bf16 TFLOP/s with float32 sums, SMs, GHz; and L2's bytes a clock."""

    name: str
    target: str
    memory: float
    tensor: float
    sms: int
    clock: float
    l2: int


CARDS = (
    Card("A100", "sm_80", 2.04, 312, 108, 1.41, 5120),
    Card("H100", "sm_90", 3.35, 989, 132, 1.83, 5120),
    Card("RTX 4090", "sm_89", 1.01, 165, 128, 2.52, 4096),
    Card("RTX 5090", "sm_120", 1.79, 210, 170, 2.41, 5440),
)
#: Shares of these rates that kernels reach; `tensor` in torch's products, `triton` in the kernels'.
REACHED = {"memory": 0.85, "l2": 0.6, "tensor": 0.7, "triton": 0.35, "issue": 0.6}
#: Microseconds: the shortest kernel; a processor's time to launch by torch, by Triton.
SHORTEST, BY_TORCH, BY_TRITON = 2.0, 5.0, 15.0
TABLE = ROOT / "benchmarks" / "kernel_table.jsonl"
HEAD = f"""# One adapted linear layer, counted

    python -m benchmarks.roofline > benchmarks/roofline.md

Nothing here is measured. Forward and backward in bf16 autocast, factors float32, gradients to x and the factors.
Kernels are assumed to reach these shares of a card's rates:
{", ".join(f"{name} {share}" for name, share in REACHED.items())};
none takes less than {SHORTEST:g} µs, and a processor needs {BY_TORCH:g} µs to launch one by torch and
{BY_TRITON:g} µs by Triton. `gpu/all.sh` measures all of it. Ratios are to the frozen layer: launched one by one, and
within a CUDA graph in brackets. All ways have one rank. "fused" goes down by the Triton kernels and up by torch,
"composed" does both by torch.

**The fused way wins with dropout, on every card and at every rank up to 128, once the GPU works for longer than
the processor needs to launch.** Without dropout both move as many bytes, so torch does it. How many tokens that takes
depends on card and width: one to eight million entries of (tokens, d), thirteen for H100 at d 768.
`triton_product.suits` draws one line for all, at 4,194,304 entries: on the small cards it could be lower; on H100,
between there and its own line, the layer is bound by launches whichever way is taken. In a CUDA graph the fused way
wins at every size.
"""


class Kernel(NamedTuple):
    """Bytes from memory and through the L2 cache, FLOPs, warps' instructions, and launches, the last by torch."""

    bytes: float
    flops: float = 0.0
    l2: float = 0.0
    instructions: float = 0.0
    launches: int = 1
    triton: bool = False

    def seconds(self, card: Card) -> float:
        tensor = REACHED["triton" if self.triton else "tensor"] * card.tensor * 1e12
        issued = REACHED["issue"] * card.sms * 4 * card.clock * 1e9
        slowest = max(
            self.bytes / (REACHED["memory"] * card.memory * 1e12),
            self.l2 / (REACHED["l2"] * card.l2 * card.clock * 1e9),
            self.flops / tensor,
            self.instructions / issued,
        )
        return max(slowest, SHORTEST * 1e-6) + (self.launches - 1) * SHORTEST * 1e-6

    def to_launch(self) -> float:
        return 1e-6 * (self.launches * BY_TRITON if self.triton else self.launches * BY_TORCH)


class Layer(NamedTuple):
    """Several linear layers of d_in to d_out that read one x, with factors of one rank."""

    tokens: int
    d_in: int
    d_out: int
    rank: int
    dropout: bool = True
    count: int = 1


def frozen(layer: Layer, card: Card) -> list[Kernel]:
    t, d, n = layer.tokens, layer.d_in, layer.d_out
    product = Kernel(2.0 * (t * d + t * n + d * n), 2.0 * t * d * n)
    return layer.count * [product, product] + (layer.count - 1) * [_passes(layer, x=6)]


def peft(layer: Layer, card: Card) -> list[Kernel]:
    """LoRA as PEFT writes it, factors in float32 under bf16 autocast: x goes to float32 for dropout, and back."""
    p = layer.dropout
    forward = [6, 9, 6] if p else [6, 6]
    backward = [6, 9, 6] if p else [6, 6]
    wide = [_passes(layer, x=bytes) for bytes in [*forward, 2, 2, 2, *backward, 6]]  # and down, dA, dx, the sum of dx
    wide += [_passes(layer, y=bytes) for bytes in (2, 4, 6, 4, 2, 2)]  # up, scaled, added; g scaled, dB, dh
    return layer.count * [*wide, *4 * [_small(layer)]]


def composed(layer: Layer, card: Card) -> list[Kernel]:
    """`plain_product`: a mask of bytes, x dropped out once a forward and once a backward for all layers that share."""
    p, count = layer.dropout, layer.count
    shared = [2, 2, 2, 6] + ([1, 5, 5, 5] if p else [])  # down, dA, dx, the sum of dx; mask, x, x again, dx masked
    return [_passes(layer, x=bytes, rank=count * layer.rank) for bytes in shared] + 6 * [_small(layer)] + _up(layer)


def fused(layer: Layer, card: Card) -> list[Kernel]:
    """Down by `triton_product`, up as the composed way."""
    t, d, p = layer.tokens, layer.d_in, layer.dropout
    total = layer.rank * layer.count
    drop = "drop(x)" if p else "x"
    shared = [
        _of(traffic.down(t, d, total), f"h = {drop} A'", t * d, total, card),
        _of(traffic.up(t, d, total), "dx = drop(dh A)" if p else "dx = dh A", t * d, total, card),
        _of(traffic.outer(t, d, total), f"dA = dh' {drop}", t * d, total, card),
        _passes(layer, x=6),
    ]
    joins = (2 if p else 0) + (2 if layer.count > 1 else 0)  # the seed; the As and the dhs
    return shared + joins * [_small(layer)] + _up(layer)


def _up(layer: Layer) -> list[Kernel]:
    """Added to y, dB and dh of each layer, and conversions of factors."""
    return layer.count * [*(_passes(layer, y=bytes) for bytes in (4, 2, 2)), *3 * [_small(layer)]]


WAYS: dict[str, Callable[[Layer, Card], list[Kernel]]] = {"PEFT LoRA": peft, "composed": composed, "fused": fused}


def _passes(layer: Layer, x: float = 0, y: float = 0, rank: int = 0) -> Kernel:
    """A kernel that moves so many bytes for each entry of x or y, and multiplies if that is what it is for."""
    entries = layer.tokens * (layer.d_in * bool(x) + layer.d_out * bool(y))
    products = 2.0 * entries * (rank or layer.rank) if (x or y) == 2 else 0.0
    return Kernel(layer.tokens * (x * layer.d_in + y * layer.d_out), products)


def _small(layer: Layer) -> Kernel:
    return Kernel(0.0)


def _of(counted: traffic.Traffic, name: str, entries: int, rank: int, card: Card) -> Kernel:
    instructions = _instructions(name, rank, card.target) * entries / 32
    return Kernel(counted.least, counted.flops, counted.moved, instructions, counted.launches, True)


def _instructions(name: str, rank: int, target: str) -> float:
    """For 32 entries, of the least rank in the table that is as wide."""
    if not _COUNTED:
        for row in map(json.loads, TABLE.read_text(encoding="utf-8").splitlines()):
            _COUNTED[row["kernel"], row["rank"], row["target"]] = row.get("instructions", 0.0)
    ranks = sorted(r for k, r, where in _COUNTED if k == name and where == target)
    return _COUNTED[name, next((r for r in ranks if r >= rank), ranks[-1]), target]


_COUNTED: dict[tuple[str, int, str], float] = {}


def microseconds(way: str | None, layer: Layer, card: Card, graph: bool) -> float:
    """The frozen layer's time with a way's on top."""
    kernels = frozen(layer, card) + (WAYS[way](layer, card) if way else [])
    on_card = sum(kernel.seconds(card) for kernel in kernels)
    return 1e6 * (on_card if graph else max(on_card, sum(kernel.to_launch() for kernel in kernels)))


def rows_of(layers: Iterable[Layer], name_of: Callable[[Layer], str]) -> str:
    """A row for each layer: on each card, the frozen time and each way's ratio to it, launched and as a graph."""
    lines = ["| " + " | ".join(["", *(f"{c.name}: frozen, µs | {' | '.join(WAYS)}" for c in CARDS)]) + " |"]
    lines.append("|---|" + "--:|" * (len(CARDS) * (1 + len(WAYS))))
    for layer in layers:
        cells = []
        for card in CARDS:
            base = {graph: microseconds(None, layer, card, graph) for graph in (False, True)}
            cells.append(f"{base[True]:.0f}")
            for way in WAYS:
                both = [microseconds(way, layer, card, graph) / base[graph] for graph in (False, True)]
                cells.append(f"{both[0]:.2f} ({both[1]:.2f})")
        lines.append(f"| {name_of(layer)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def least_tokens(d: int, rank: int, dropout: bool, card: Card, graph: bool) -> int | None:
    """From how many tokens on, in powers of two, the fused way is no slower than the composed one, to a hundredth."""
    sizes = [2**i for i in range(4, 18)]
    slower = [
        tokens
        for tokens in sizes
        if microseconds("fused", layer := Layer(tokens, d, d, rank, dropout), card, graph)
        > 1.01 * microseconds("composed", layer, card, graph)
    ]
    after = 2 * slower[-1] if slower else sizes[0]
    return after if after <= sizes[-1] else None


def counts() -> str:
    """Bytes for each entry of a square layer's x beside its frozen product, and launches."""
    lines = ["| dropout | way | bytes for each entry of (tokens, d) | launches |", "|---|---|--:|--:|"]
    for dropout in (True, False):
        layer = Layer(4096, 2048, 2048, 14, dropout)
        for name, way in WAYS.items():
            kernels = way(layer, CARDS[1])
            moved = sum(kernel.bytes for kernel in kernels) / layer.tokens / layer.d_in
            launches = sum(kernel.launches for kernel in kernels)
            lines.append(f"| {'0.05' if dropout else 'none'} | {name} | {moved:.1f} | {launches} |")
    return "\n".join(lines)


def crossings() -> str:
    lines = ["| d | rank | dropout | " + " | ".join(f"{c.name}: launched, graph" for c in CARDS) + " |"]
    lines.append("|--:|--:|---|" + "---|" * len(CARDS))
    for d in (768, 2048, 4096):
        for rank in (14, 60, 128):
            for dropout in (True, False):
                cells = []
                for card in CARDS:
                    thresholds = [least_tokens(d, rank, dropout, card, graph) for graph in (False, True)]
                    cells.append(", ".join("never" if tokens is None else f"{tokens:,}" for tokens in thresholds))
                lines.append(f"| {d} | {rank} | {'0.05' if dropout else 'none'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    sizes = [Layer(tokens, d, d, 14) for d in (768, 2048, 4096) for tokens in (256, 1024, 4096, 16384)]
    ranks = [Layer(4096, 2048, 2048, rank) for rank in (8, 14, 30, 60, 128)]
    three = [Layer(tokens, 2048, 2048, 14, count=count) for tokens in (1024, 4096, 16384) for count in (1, 3)]
    print(HEAD)
    print("## Bytes and launches\n\n" + counts())
    print("\n## Tokens and widths, rank 14, dropout 0.05\n\n" + rows_of(sizes, lambda a: f"{a.tokens:,} x {a.d_in}"))
    print("\n## Ranks, 4,096 tokens of 2,048, dropout 0.05\n\n" + rows_of(ranks, lambda a: f"rank {a.rank}"))
    print("\n## Layers that read one x\n\n" + rows_of(three, lambda a: f"{a.tokens:,} x {a.d_in}, {a.count} layers"))
    print("\n## From how many tokens on the fused way is no slower than the composed one\n\n" + crossings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
