"""Adapted linear layers, forward and backward, in bf16: every way to compute them, directly and as a CUDA graph.

    python -m benchmarks.gpu.linear --out DIR

Gradients go to x, A and B; factors are bf16 as the activations. The ways take turns, the L2 cache is cleared between
them; rows hold microseconds and the median ratio to the frozen linear. Where a direct way is slower than its replay,
the time goes to Python's launches, not to the kernels. The rehearsal runs the kernels in Triton's interpreter.
"""

import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from benchmarks.gpu.bare import plain_product, product, triton_product
from benchmarks.gpu.rows import Rows, arguments
from benchmarks.gpu.timing import Run, captured, compile_backend, in_turns, ratios
from torch import Tensor
from torch.nn import functional as F

RANK = 14
#: (d_in, d_out, tokens, dropout, layers that read one x), the most telling first.
SIZES = (
    (2048, 2048, 4096, 0.05),
    (2048, 2048, 4096, 0.05, 3),
    (768, 768, 4096, 0.05),
    (2048, 8192, 4096, 0.05),
    (8192, 2048, 4096, 0.05),
    (4096, 4096, 4096, 0.05),
    (2048, 2048, 4096, 0.0),
    (768, 768, 4096, 0.0),
    (2048, 2048, 16384, 0.05),
    (768, 768, 16384, 0.05),
    (4096, 4096, 16384, 0.05),
    (2048, 2048, 1024, 0.05),
    (4096, 4096, 4096, 0.0),
    (2048, 512, 4096, 0.05),
)
#: Seconds that one size takes, compiling included: none is begun with less time left.
ONE_SIZE = 8

Ys = list[Tensor]
Add = Callable[[Ys, Tensor, Ys, Ys, float], Ys]


class Tensors(NamedTuple):
    """What one size computes with; A and B of rank r are drawn for each way and layer."""

    Ws: list[Tensor]
    x: Tensor
    g: Tensor


def alone(add: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> Add:
    """Each layer by itself."""
    return lambda ys, x, As, Bs, p: [add(y, x, A, B, p) for y, A, B in zip(ys, As, Bs, strict=True)]


def lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    """LoRA as it is usually written: dropout, two linear layers, scaling, sum."""
    return y + F.linear(F.linear(F.dropout(x, p) if p else x, A), B) * 2.0


def by(parts: ModuleType) -> Add:
    """Down together, up each, by torch's operations or by the kernels."""

    def add(ys: Ys, x: Tensor, As: Ys, Bs: Ys, p: float) -> Ys:
        hs = product.down_by(parts, x, As, p, x.dtype)
        return [product.up_add(y, h, B, reuse_y=True) for y, h, B in zip(ys, hs, Bs, strict=True)]

    return add


def run_of(tensors: Tensors, add: Add | None, rank: int, p: float) -> Run:
    """One forward and backward of a way."""
    Ws, x, g = tensors
    (d_out, d_in), like = Ws[0].shape, {"device": x.device, "dtype": x.dtype}
    As = [(torch.randn(rank, d_in, **like) / d_in**0.5).requires_grad_() for _ in Ws]
    Bs = [(torch.randn(d_out, rank, **like) * 0.01).requires_grad_() for _ in Ws]
    leaves = [x] if add is None else [x, *As, *Bs]

    def run() -> None:
        ys = [F.linear(x, W) for W in Ws]
        torch.autograd.grad(ys if add is None else add(ys, x, As, Bs, p), leaves, len(Ws) * [g])

    return run


def ways(tensors: Tensors, p: float) -> dict[str, Run]:
    torch._dynamo.reset()  # `lora` has been compiled for other sizes, and after eight of them it would stay uncompiled
    kernels, several = by(triton_product), len(tensors.Ws) > 1
    adds: dict[str, tuple[Add | None, int]] = {
        "frozen": (None, 8),
        "LoRA r 8": (alone(lora), 8),
        f"LoRA r {RANK}": (alone(lora), RANK),
        f"LoRA r {RANK}, compiled": (alone(torch.compile(lora, **compile_backend(tensors.x.device))), RANK),
        f"composed r {RANK}": (alone(product.composed), RANK),
        f"down and up r {RANK}": (by(plain_product), RANK),
        f"Triton r {RANK}": (kernels, RANK),
    }
    if several:
        each = alone(lambda y, x, A, B, p: kernels([y], x, [A], [B], p)[0])
        adds[f"Triton r {RANK}, each layer alone"] = (each, RANK)
    return {name: run_of(tensors, add, rank, p) for name, (add, rank) in adds.items()}


def measure(rows: Rows, size: tuple[int, int, int, float, int], device: torch.device, rounds: int) -> None:
    d_in, d_out, tokens, p, layers = size
    # The interpreter multiplies bf16 numbers as if their codes were integers.
    like = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float16}
    torch.manual_seed(0)
    x = torch.randn(tokens, d_in, **like).requires_grad_()
    Ws = [torch.randn(d_out, d_in, **like) / d_in**0.5 for _ in range(layers)]
    tensors = Tensors(Ws, x, torch.randn(tokens, d_out, **like))
    several = f"{layers} times " if layers > 1 else ""
    where = f"linear {several}{d_in} to {d_out}, {tokens} tokens, dropout {p}"
    runs = warmed(rows, f"{where}, direct", ways(tensors, p))
    compare(rows, f"{where}, direct", runs, device, rounds)
    graphs = {}
    for name, run in runs.items():
        try:
            graphs[name] = captured(run, device)
        except Exception as error:
            rows.failed(error, table=f"{where}, graph", way=name)
    compare(rows, f"{where}, graph", graphs, device, rounds)


def warmed(rows: Rows, table: str, runs: dict[str, Run]) -> dict[str, Run]:
    """Those that run; the first time compiles."""
    working = {}
    for name, run in runs.items():
        try:
            run()
            working[name] = run
        except Exception as error:
            rows.failed(error, table=table, way=name)
    return working


def compare(rows: Rows, table: str, runs: dict[str, Run], device: torch.device, rounds: int) -> None:
    if "frozen" not in runs:
        return
    took = in_turns(runs, device, rounds=rounds, seconds=2.0, cold=True)
    for name, times in took.items():
        row = {"us": statistics.median(times), **ratios(times, took["frozen"]), "rounds": len(times)}
        rows.add(table=table, way=name, **row)


def main() -> int:
    given, rows = arguments("linear", __doc__)
    device = torch.device("cpu" if given.rehearse else "cuda")
    for d_in, d_out, tokens, p, *several in [(72, 40, 33, 0.05, 2)] if given.rehearse else SIZES:
        size = d_in, d_out, tokens, p, (several or [1])[0]
        if given.until - time.time() < ONE_SIZE:
            rows.failed("left out: no time", table=f"linear {size}")
        else:
            measure(rows, size, device, rounds=2 if given.rehearse else 50)
    return int(rows.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
