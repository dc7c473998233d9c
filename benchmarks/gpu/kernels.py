"""The Triton kernels against float64: values and gradients, over ranks, dtypes, dropout and ragged shapes.

    python -m benchmarks.gpu.kernels --out DIR
    TRITON_INTERPRET=1 python -m benchmarks.gpu.kernels --out DIR --rehearse    # Triton's interpreter, without a GPU

Each case is a row with its errors, relative to the norm, and what is allowed. Cases run in several processes, because
most of the time goes to compiling; a process that a case has broken is followed by another for the rest of its share.
"""

import itertools
import multiprocessing
import os
import sys
import time
from collections import deque
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from benchmarks.gpu.bare import masks, product, triton_product
from benchmarks.gpu.rows import Rows, arguments, read

RANKS = (14, 8, 16, 1, 4, 32, 33, 64, 112, 128)
#: (tokens, d_in, d_out): their number has no divisor in common with the number of dropouts, so that all combine.
SHAPES = (
    (4096, 2048, 512),
    (1000, 768, 768),
    (513, 2048, 1000),
    (3, 200, 136),
    (64, 72, 3072),
    (77, 100, 53),
    (1, 2048, 8192),
)
SMALL_SHAPES = ((33, 72, 40), (3, 136, 72), (17, 48, 53))
DROPOUTS = (0.0, 0.05, 0.5)
#: Of the norm; several roundings of 2^-9 and 2^-12, whichever of x and the products is shorter.
ALLOWED = {torch.bfloat16: 1.6e-2, torch.float16: 4e-3}
#: The exit code of a process after a case that left its GPU context unusable.
BROKEN = 3


class Case(NamedTuple):
    """One set of inputs; d_in and d_out are 0 where the frequency of dropped entries is checked."""

    rank: int
    dtype: torch.dtype
    factors: torch.dtype
    dropout: float
    tokens: int
    d_in: int
    d_out: int
    layers: int = 1  # that read one x, with factors of this rank each

    def named(self) -> dict[str, object]:
        return {key: str(v).removeprefix("torch.") if "torch" in str(v) else v for key, v in self._asdict().items()}


def shares(rehearse: bool) -> list[list[Case]]:
    """The cases in shares that use the same compiled kernels and take about as long as each other.

    Compiling costs about a second a kernel, so each combination of rank, dtypes and dropout sees one shape, in turn.
    """
    # The interpreter multiplies bf16 numbers as if their codes were integers.
    dtypes = (torch.float16,) if rehearse else (torch.bfloat16, torch.float16)
    shapes, dropouts = (SMALL_SHAPES, DROPOUTS[:2]) if rehearse else (SHAPES, DROPOUTS)
    kinds = [(rank, *rest) for rank, *rest in itertools.product((14,) if rehearse else RANKS, dtypes, (False, True))]
    turns = itertools.cycle(shapes)
    cases = [
        [Case(rank, dtype, dtype if same else torch.float32, p, *next(turns)) for p in dropouts]
        for rank, dtype, same in kinds
    ]
    together = [
        Case(rank, dtypes[0], torch.float32, p, *next(turns), layers=3)
        for rank in ((5,) if rehearse else (14, 5, 33))
        for p in dropouts
    ]
    mask = [Case(0, dtypes[0], torch.float32, p, 64 if rehearse else 4096, 0, 0) for p in DROPOUTS[1:]]
    return [mask, together, *cases]


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """The row of a case: errors by name and whether all are allowed, or the exception."""
    try:
        errors_found, allowed = dropped(case, device) if not case.d_in else (errors(case, device), ALLOWED[case.dtype])
    except Exception as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}"[:400]}
    return {**errors_found, "allowed": allowed, "passed": all(value <= allowed for value in errors_found.values())}


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """Relative errors of the results and of the gradients, with the kernels' own mask in the reference."""
    rank, dtype, factors, p, tokens, d_in, d_out, layers = case
    torch.manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    x = drawn(tokens, d_in, dtype=dtype)
    ys = [drawn(tokens, d_out, dtype=dtype) for _ in range(layers)]
    As = [drawn(rank, d_in, dtype=factors) for _ in range(layers)]
    Bs = [drawn(d_out, rank, dtype=factors) for _ in range(layers)]
    inputs = [x, *ys, *As, *Bs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    kept = triton_product.kept(triton_product.draw(x, p), x.shape, p) * masks.keep_scale(p) if p else 1.0
    dropped = exact[0] * kept
    those = [exact[1 + i * layers : 1 + (i + 1) * layers] for i in range(3)]
    wanted = [y + (dropped @ A.T) @ B.T for y, A, B in zip(*those, strict=True)]
    torch.manual_seed(1)
    hs = product.down_by(triton_product, x, As, p, dtype)
    out = [product.up_add(*given) for given in zip(ys, hs, Bs, strict=True)]
    gs = [torch.randn_like(t) for t in out]
    got = [*out, *torch.autograd.grad(out, inputs, gs)]
    want = [*wanted, *torch.autograd.grad(wanted, exact, [g.double() for g in gs])]
    names = [*layers * ["out"], "dx", *(name for name in ("dy", "dA", "dB") for _ in range(layers))]
    largest: dict[str, float] = {}
    for name, a, b in zip(names, got, want, strict=True):
        largest[name] = max(largest.get(name, 0.0), ((a - b).norm() / b.norm()).item())
    return largest


def dropped(case: Case, device: torch.device) -> tuple[dict[str, float], float]:
    """How far the frequency of dropped entries lies from the probability; five standard deviations are allowed."""
    p, x = case.dropout, torch.empty(case.tokens, case.tokens, device=device)
    dropped_share = 1 - triton_product.kept(torch.tensor([7], device=device), x.shape, p).float().mean().item()
    return {"frequency": abs(dropped_share - p)}, 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5


def work(share: list[Case], begun: Any, until: float, device: torch.device, rows: Rows) -> None:
    """The cases of a share from the first that wasn't begun yet, in a process of its own."""
    for case in share[begun.value :]:
        if time.time() > until:
            return
        begun.value += 1
        rows.add(**case.named(), **measured(case, device))
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access leaves every later call of the process failing
                os._exit(BROKEN)


def run(waiting: list[list[Case]], workers: int, until: float, device: torch.device, rows: Rows) -> None:
    """All shares, ``workers`` at a time."""
    # Forked processes need not import torch again; the parent never touches CUDA, which could not be forked.
    context = multiprocessing.get_context("fork")
    queue = deque((share, context.Value("i", 0)) for share in waiting)
    running: dict[Any, tuple[list[Case], Any]] = {}
    left_out = 0
    while queue or running:
        while queue and len(running) < workers:
            share, begun = queue.popleft()
            process = context.Process(target=work, args=(share, begun, until, device, rows))
            process.start()
            running[process] = share, begun
        wait([process.sentinel for process in running])
        for process in [p for p in running if not p.is_alive()]:
            process.join()
            share, begun = running.pop(process)
            if process.exitcode not in (0, BROKEN):
                case = share[max(0, begun.value - 1)]
                rows.add(**case.named(), passed=False, error=f"its process ended with exit code {process.exitcode}")
            if process.exitcode != 0 and begun.value < len(share) and time.time() < until:
                queue.append((share, begun))
            else:
                left_out += len(share) - begun.value
    if left_out:
        rows.failed(f"{left_out} cases were left out: no time")


def main() -> int:
    given, rows = arguments("kernels", __doc__)
    device = torch.device("cpu" if given.rehearse else "cuda")
    workers = 1 if given.rehearse else min(16, os.cpu_count() or 1)
    run(shares(given.rehearse), workers, given.until, device, rows)
    wrong = [row for row in read(given.out) if row["part"] == "kernels" and row.get("passed") is False]
    return int(rows.failures > 0 or len(wrong) > 0)


if __name__ == "__main__":
    sys.exit(main())
