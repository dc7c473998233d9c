"""Time and saved memory of one adapted linear on a CPU: the one operation against its composition and PEFT's LoRA.

    OMP_NUM_THREADS=1 python benchmarks/product.py

Every way runs forward and backward on the same tensors, in turns, in a random order each round; what is
printed are medians over rounds of *ratios within a round* of processor time, so a busy machine disturbs both
sides alike. With more than one thread, processor time counts waiting threads too: --wall takes wall clock.
"extra" is what the adapter adds to the frozen linear, where the frozen linear's own gradient goes to x.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ziggurat.lowrank.product import composed, low_rank_add


class Pair(nn.Module):
    """A frozen linear with one factor pair added by ``add``."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float, add: Callable[..., Tensor]) -> None:
        super().__init__()
        self.base, self.dropout, self.add = base, dropout, add
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.randn(base.out_features, rank) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.base(x), x, self.A, self.B, self.dropout)


def frozen(d: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d, d).requires_grad_(False)


def peft_lora(d: int, rank: int, dropout: float) -> nn.Module:
    config = LoraConfig(r=rank, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(nn.Sequential(frozen(d)), config).base_model.model[0]


def ways(d: int, rank: int, dropout: float) -> dict[str, nn.Module]:
    def reuse(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
        return low_rank_add(y, x, A, B, p, reuse_y=True)

    return {
        "frozen": frozen(d),
        "PEFT LoRA r 8": peft_lora(d, 8, dropout),
        f"PEFT LoRA r {rank}": peft_lora(d, rank, dropout),
        f"composed r {rank}": Pair(frozen(d), rank, dropout, composed),
        f"one operation r {rank}": Pair(frozen(d), rank, dropout, low_rank_add),
        f"one operation r {rank}, reusing y": Pair(frozen(d), rank, dropout, reuse),
    }


def seconds(linear: nn.Module, x: Tensor, g: Tensor, clock: Callable[[], float]) -> float:
    begin = clock()
    linear(x).backward(g)
    return clock() - begin


def saved_bytes(linears: list[nn.Module], x: Tensor) -> int:
    """Bytes autograd keeps for these linears, all reading x; storage counted once, parameters not at all."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for linear in linears for p in linear.parameters()}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [linear(x) for linear in linears]
    del outputs
    return sum(n for at, n in storages.items() if at not in parameters)


def measure(tokens: tuple[int, ...], d: int, rank: int, dropout: float, limit_s: float, wall: bool) -> None:
    clock = time.perf_counter if wall else time.process_time
    torch.manual_seed(1)
    linears = ways(d, rank, dropout)
    # x comes from a layer that trains below, as in a model: its gradient is needed, but not a leaf's.
    x = torch.randn(*tokens, d).requires_grad_()
    g = torch.randn(*tokens, d)
    times: dict[str, list[float]] = {name: [] for name in linears}
    for linear in linears.values():
        seconds(linear, x, g, clock)
    order = list(linears)
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        random.shuffle(order)
        for name in order:
            x.grad = None
            times[name].append(seconds(linears[name], x, g, clock))
    base, lora = times["frozen"], times["PEFT LoRA r 8"]
    print(f"\ntokens {'x'.join(map(str, tokens))}, d {d}, dropout {dropout}: {len(base)} rounds\n")
    print("| | step / frozen | extra / LoRA r 8's extra | saved by q and v, MiB |\n|---|--:|--:|--:|")
    for name, linear in linears.items():
        ratio = statistics.median(t / b for t, b in zip(times[name], base, strict=True))
        extra = statistics.median(t - b for t, b in zip(times[name], base, strict=True))
        extra /= statistics.median(t - b for t, b in zip(lora, base, strict=True))
        kept = saved_bytes([linear, ways(d, rank, dropout)[name]], x) / 2**20
        print(f"| {name} | {ratio:.2f} | {extra:.2f} | {kept:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="time for each of the settings")
    parser.add_argument("--wall", action="store_true", help="wall clock instead of processor time")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--rank", type=int, default=14)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for dropout in (0.0, 0.05, 0.1):
        measure((16, 64), args.d, args.rank, dropout, args.seconds, args.wall)


if __name__ == "__main__":
    main()
