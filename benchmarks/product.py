"""Time and saved memory of a query and a value that read one input, on a CPU: the operation, alternatives, PEFT's LoRA.

    python benchmarks/product.py

Every way runs forward and backward on the same tensors, in turns, in a random order each round; what is
printed are medians over rounds of *ratios within a round* of processor time, so a busy machine disturbs both
sides alike. "extra" is what the adapter adds to the two frozen linears, whose own gradient goes to x.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ziggurat.lowrank.product import composed, down, low_rank_add, up_add

Way = Callable[[Tensor], list[Tensor]]


def frozen(d: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d, d).requires_grad_(False)


def peft_lora(d: int, rank: int, dropout: float) -> Way:
    def linear() -> nn.Module:
        config = LoraConfig(r=rank, lora_dropout=dropout, target_modules=["0"])
        return get_peft_model(nn.Sequential(frozen(d)), config).base_model.model[0]  # type: ignore[union-attr, return-value]

    query, value = linear(), linear()
    return lambda x: [query(x), value(x)]


def ways(d: int, rank: int, dropout: float) -> dict[str, Way]:
    query, value = frozen(d), frozen(d)
    pairs = [(nn.Parameter(torch.randn(rank, d) / d**0.5), nn.Parameter(torch.randn(d, rank) * 0.01)) for _ in range(2)]

    def each(add: Callable[..., Tensor]) -> Way:
        return lambda x: [add(W(x), x, *pair, dropout) for W, pair in zip((query, value), pairs, strict=True)]

    def reuse(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
        return low_rank_add(y, x, A, B, p, reuse_y=True)

    def together(x: Tensor) -> list[Tensor]:
        hs = down(x, [A for A, _ in pairs], dropout)
        return [up_add(W(x), h, B, reuse_y=True) for W, h, (_, B) in zip((query, value), hs, pairs, strict=True)]

    return {
        "frozen": lambda x: [query(x), value(x)],
        "PEFT LoRA r 8": peft_lora(d, 8, dropout),
        f"PEFT LoRA r {rank}": peft_lora(d, rank, dropout),
        f"composed of plain operations, r {rank}": each(composed),
        f"low_rank_add, r {rank}": each(low_rank_add),
        f"low_rank_add, r {rank}, reusing y": each(reuse),
        f"down together, up_add each, r {rank}, reusing y": together,
    }


def seconds(way: Way, x: Tensor, g: Tensor) -> float:
    begin = time.process_time()
    torch.autograd.backward(way(x * 1.0), [g, g])
    return time.process_time() - begin


def saved_bytes(way: Way, x: Tensor) -> int:
    """Bytes autograd keeps for both linears; storage counted once, parameters (leaves) not at all."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t is x or not t.is_leaf or not t.requires_grad:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = way(x)
    del outputs
    return sum(storages.values())


def measure(tokens: tuple[int, ...], d: int, rank: int, dropout: float, limit_s: float) -> None:
    torch.manual_seed(1)
    built = ways(d, rank, dropout)
    x = torch.randn(*tokens, d).requires_grad_()
    g = torch.randn(*tokens, d)
    frozen_kept = saved_bytes(built["frozen"], x)
    kept = {name: saved_bytes(way, x) - frozen_kept for name, way in built.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    order = list(built)
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end or len(times["frozen"]) < 10:
        random.shuffle(order)
        for name in order:
            x.grad = None
            times[name].append(seconds(built[name], x, g))
    times = {name: took[1:] for name, took in times.items()}  # the first round warms up
    base, lora = times["frozen"], times["PEFT LoRA r 8"]
    of_lora = statistics.median(t - b for t, b in zip(lora, base, strict=True))
    print(f"\ntokens {'x'.join(map(str, tokens))}, d {d}, dropout {dropout}: {len(base)} rounds\n")
    print("| | step / frozen | extra, ms | extra / LoRA r 8's | saved, MiB |\n|---|--:|--:|--:|--:|")
    for name in built:
        ratio = statistics.median(t / b for t, b in zip(times[name], base, strict=True))
        extra = statistics.median(t - b for t, b in zip(times[name], base, strict=True))
        print(
            f"| {name} | {ratio:.2f} | {1e3 * extra:.1f} | {extra / of_lora:.2f} | {kept[name] / 2**20:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="time for each of the settings")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--rank", type=int, default=14)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, one thread, {os.cpu_count()} cores, load {load}")
    for dropout in (0.05, 0.0):
        measure((16, 64), args.d, args.rank, dropout, args.seconds)


if __name__ == "__main__":
    main()
