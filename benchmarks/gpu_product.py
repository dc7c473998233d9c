"""The low-rank addition on a CUDA GPU: checked first, then timed. Needs torch, triton and src/ziggurat/lowrank only.

    python benchmarks/gpu_product.py | tee gpu_product.txt
    python benchmarks/gpu_product.py --interpret    # the checks alone, small shapes, without a GPU

Forward and backward of one linear, bf16 activations and base weight, gradients to x, A and B. The ways take
turns, the L2 cache is cleared between them, and what is printed are medians of CUDA-event times over the
frozen linear's median; "us" is the frozen linear in microseconds. "launch-bound" rows, where the kernels are
shorter than the time Python needs to launch them, show the launches, not the kernels: --graph replays each
way from a CUDA graph instead.
"""

import argparse
import os
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

if "--interpret" in sys.argv:  # read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn import functional as F

# The package's own __init__ imports PEFT, which a bare GPU machine need not have.
package = types.ModuleType("ziggurat")
package.__path__ = [str(Path(__file__).resolve().parents[1] / "src" / "ziggurat")]
sys.modules.setdefault("ziggurat", package)

from ziggurat.lowrank import mask as masks  # noqa: E402
from ziggurat.lowrank import triton_product  # noqa: E402
from ziggurat.lowrank.product import composed, down, low_rank_add, up_add  # noqa: E402

SHAPES = ((1000, 768, 768, 14), (3, 200, 136, 1), (513, 2048, 1000, 112), (64, 72, 3072, 33))
INTERPRETED = ((33, 72, 40, 14), (3, 136, 72, 1), (17, 48, 136, 33))


def check(device: torch.device) -> None:
    """Values and gradients of the kernels against float64 with the same mask; raises where they differ."""
    worst, interpreted = 0.0, device.type == "cpu"
    for tokens, d_in, d_out, rank in INTERPRETED if interpreted else SHAPES:
        # The interpreter multiplies bf16 numbers as if their codes were integers.
        for dtype in (torch.float16,) if interpreted else (torch.bfloat16, torch.float16):
            for factor_dtype in (dtype, torch.float32):
                for p in (0.0, 0.1):
                    worst = max(worst, error(tokens, d_in, d_out, rank, dtype, factor_dtype, p, device))
    x = torch.empty((64, 512) if interpreted else (4096, 4096), device=device)
    seed = torch.tensor([7], device=device)
    for p in (0.05, 0.5):
        found = 1 - triton_product.keep_mask(x, p, seed).float().mean().item()
        if abs(found - p) > 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5:
            raise AssertionError(f"dropout {p} dropped {found}")
    dtypes = "fp16 in the interpreter" if interpreted else "bf16 and fp16"
    print(f"checked: worst error {worst:.1e} of the norm ({dtypes}; allowed 2e-2)")


def error(
    tokens: int,
    d_in: int,
    d_out: int,
    rank: int,
    dtype: torch.dtype,
    factors: torch.dtype,
    p: float,
    device: torch.device,
) -> float:
    torch.manual_seed(0)
    shapes = (tokens, d_out), (tokens, d_in), (rank, d_in), (d_out, rank)
    dtypes = dtype, dtype, factors, factors
    inputs = [torch.randn(s, device=device).to(t).requires_grad_() for s, t in zip(shapes, dtypes, strict=True)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    seed = torch.empty(1, dtype=torch.int64, device=device).random_()
    y, x, A, B = exact
    kept = triton_product.keep_mask(x, p, seed) * masks.keep_scale(p) if p else 1.0
    wanted = y + ((x * kept) @ A.T) @ B.T
    torch.manual_seed(1)
    if device.type == "cpu":  # Triton's interpreter; low_rank_add takes the kernels on a GPU only
        out = triton_product.fused_low_rank_add(*inputs, p, dtype, False)
    else:
        with torch.autocast("cuda", dtype):
            out = low_rank_add(*inputs, p)
    if "_FusedLowRankAdd" not in type(out.grad_fn).__name__:
        raise AssertionError(f"the kernels were not chosen: {type(out.grad_fn).__name__}")
    g = torch.randn_like(out)
    pairs = [(out, wanted)]
    pairs += zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, exact, g.double()), strict=True)
    errors = [((got - want).norm() / want.norm()).item() for got, want in pairs]
    if not max(errors) < 2e-2:
        case = f"tokens {tokens} d {d_in} to {d_out} rank {rank} {dtype} factors {factors} dropout {p}"
        raise AssertionError(f"{case}: relative errors of out, y, x, A, B: {errors}")
    return max(errors)


def lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    """LoRA as it is usually written: dropout, two linears, scaling, sum."""
    return y + F.linear(F.linear(F.dropout(x, p) if p else x, A), B) * 2.0


def down_and_up(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    (h,) = down(x, [A], p)
    return up_add(y, h, B, reuse_y=True)


def kernels(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return low_rank_add(y, x, A, B, p, reuse_y=True)


def steps(d: int, tokens: int, rank: int, p: float, device: torch.device) -> dict[str, Callable[[], None]]:
    """One forward and backward of each way, on the same tensors."""
    torch.manual_seed(0)
    W = torch.randn(d, d, device=device, dtype=torch.bfloat16) / d**0.5
    x = torch.randn(tokens, d, device=device, dtype=torch.bfloat16).requires_grad_()
    g = torch.randn(tokens, d, device=device, dtype=torch.bfloat16)

    def step(add: Callable[..., Tensor] | None, r: int) -> Callable[[], None]:
        A = (torch.randn(r, d, device=device, dtype=torch.bfloat16) / d**0.5).requires_grad_()
        B = (torch.randn(d, r, device=device, dtype=torch.bfloat16) * 0.01).requires_grad_()
        leaves = (x,) if add is None else (x, A, B)

        def run() -> None:
            y = F.linear(x, W)
            torch.autograd.grad(y if add is None else add(y, x, A, B, p), leaves, g)

        return run

    compiled = torch.compile(lora, dynamic=False)
    return {
        "frozen": step(None, 8),
        "LoRA r 8": step(lora, 8),
        f"LoRA r {rank}": step(lora, rank),
        f"LoRA r {rank}, compiled": step(compiled, rank),
        f"composed r {rank}": step(composed, rank),
        f"down and up r {rank}": step(down_and_up, rank),
        f"Triton r {rank}": step(kernels, rank),
    }


def captured(run: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    clear = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    for run in ways.values():
        for _ in range(5):
            run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            clear.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--rank", type=int, default=14)
    parser.add_argument("--d", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--graph", action="store_true", help="replay each way from a CUDA graph")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--interpret", action="store_true", help="check in Triton's interpreter, without a GPU")
    args = parser.parse_args()
    if args.interpret:
        check(torch.device("cpu"))
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; --interpret checks the kernels without one")
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_product.triton.__version__}")
    check(device)
    if args.check_only:
        return
    for p in (0.0, 0.05):
        header = None
        for d in args.d:
            for tokens in args.tokens:
                ways = steps(d, tokens, args.rank, p, device)
                ways = {k: v for k, v in ways.items() if not (args.no_compile and "compiled" in k)}
                for run in ways.values():  # compile before anything is captured
                    run()
                if args.graph:
                    ways = {k: captured(v) for k, v in ways.items()}
                took = microseconds(ways, args.rounds)
                if header is None:
                    header = [k for k in took if k != "frozen"]
                    print(f"\n| dropout {p} | frozen, us | " + " | ".join(header) + " |")
                    print("|---|--:|" + "--:|" * len(header))
                ratios = " | ".join(f"{took[k] / took['frozen']:.3f}" for k in header)
                print(f"| d {d}, {tokens} tokens | {took['frozen']:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
