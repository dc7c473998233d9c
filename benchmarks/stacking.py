"""How MSPLoRA's tiers become one pair a linear: concatenated in each call, assembled once a step, or stored stacked.

    python benchmarks/stacking.py [--layers 12] [--d 768 2048]

One role of some layers, ranks 8, 4 and 2. Each way makes the pairs of all layers from what is stored, runs their
backward with fixed gradients, and takes a fused AdamW step on what is stored: all that a training step does to get
from parameters to pairs and back. Processor time, medians of ratios within a round; how: benchmarks/paired.py.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
from paired import head, ratio, times
from torch import Tensor, nn

from ziggurat.lowrank.pair import FactorPair, stack

RANKS, GROUPS = (8, 4, 2), 3
SCALES = tuple(16 / r for r in RANKS)
Pairs = list[FactorPair]


def groups(layers: int) -> tuple[list[int], list[int], list[int]]:
    """Which pair of each tier a layer has."""
    return [0] * layers, [n * GROUPS // layers for n in range(layers)], list(range(layers))


def tiers(d: int, layers: int) -> list[list[FactorPair]]:
    torch.manual_seed(0)

    def pair(r: int) -> FactorPair:
        return FactorPair(nn.Parameter(torch.randn(r, d) / d**0.5), nn.Parameter(torch.randn(d, r)))

    return [[pair(r) for _ in range(n)] for r, n in zip(RANKS, (1, GROUPS, layers), strict=True)]


def by_call(d: int, layers: int) -> tuple[list[Tensor], Callable[[], Pairs]]:
    """Each linear concatenates its three pairs when it is called. What Ziggurat does."""
    stored, of = tiers(d, layers), groups(layers)

    def make() -> Pairs:
        return [stack([tier[g[n]] for tier, g in zip(stored, of, strict=True)], SCALES) for n in range(layers)]

    return [t for tier in stored for pair in tier for t in pair], make


def once_a_step(d: int, layers: int) -> tuple[list[Tensor], Callable[[], Pairs]]:
    """All layers' pairs in two tensors, (layers, 14, d) and (layers, d, 14), made at the start of a step."""
    stored, of = tiers(d, layers), groups(layers)

    def make() -> Pairs:
        downs = [torch.stack([p.A for p in tier])[g] for tier, g in zip(stored, of, strict=True)]
        ups = [s * torch.stack([p.B for p in tier])[g] for tier, g, s in zip(stored, of, SCALES, strict=True)]
        A, B = torch.cat(downs, dim=1), torch.cat(ups, dim=2)
        return [FactorPair(a, b) for a, b in zip(A.unbind(), B.unbind(), strict=True)]

    return [t for tier in stored for pair in tier for t in pair], make


def stored_stacked(d: int, layers: int) -> tuple[list[Tensor], Callable[[], Pairs]]:
    """All pairs of a role are rows of one A and columns of one B; a call takes its own by their numbers."""
    stored, of = tiers(d, layers), groups(layers)
    A = nn.Parameter(torch.cat([p.A.detach() for tier in stored for p in tier]))
    B = nn.Parameter(torch.cat([p.B.detach() for tier in stored for p in tier], dim=1))
    starts = [0, RANKS[0], RANKS[0] + GROUPS * RANKS[1]]
    rows = [
        torch.cat([torch.arange(r) + start + g[n] * r for r, start, g in zip(RANKS, starts, of, strict=True)])
        for n in range(layers)
    ]
    scales = torch.cat([torch.full((r,), s) for r, s in zip(RANKS, SCALES, strict=True)])

    def make() -> Pairs:
        return [FactorPair(A.index_select(0, r), B.index_select(1, r) * scales) for r in rows]

    return [A, B], make


def step(stored: Iterable[Tensor], make: Callable[[], Pairs], d: int, layers: int) -> Callable[[], None]:
    rank = sum(RANKS)
    gradients = [g for _ in range(layers) for g in (torch.ones(rank, d), torch.ones(d, rank))]
    optimizer = torch.optim.AdamW(stored, lr=0.0, weight_decay=0.0, fused=True)

    def run() -> None:
        torch.autograd.backward([t for pair in make() for t in pair], gradients)
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="time for each width")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d", type=int, nargs="+", default=[768, 2048])
    args = parser.parse_args()
    print(head())
    for d in args.d:
        making = {"in each call": by_call, "once a step": once_a_step, "stored stacked": stored_stacked}
        ways = {name: of(d, args.layers) for name, of in making.items()}
        made = {name: make() for name, (_, make) in ways.items()}
        for pairs in made.values():
            for pair, wanted in zip(pairs, made["in each call"], strict=True):
                torch.testing.assert_close(pair.B @ pair.A, wanted.B @ wanted.A)
        took = times({name: step(*way, d, args.layers) for name, way in ways.items()}, args.seconds, least=20)
        print(f"\n### {args.layers} layers, d {d}: {len(took['in each call'])} rounds\n")
        print("| | ms a step | / in each call (quartiles) |\n|---|--:|--:|")
        for name, seconds in took.items():
            print(
                f"| {name} | {1e3 * statistics.median(seconds):.2f} | {ratio(seconds, took['in each call'])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
