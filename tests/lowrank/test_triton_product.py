"""The Triton kernels: in the interpreter where there is no GPU, compiled for GPUs, and when they are chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ziggurat.lowrank import product

triton_product = pytest.importorskip("ziggurat.lowrank.triton_product", reason="Triton is not installed")


def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: whether Triton interprets or compiles is decided when it is imported."""
    checks = Path(__file__).with_name("interpreted_kernels.py")
    # Without xdist, which would start this folder's conftest in workers of its own.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout or "%]" in run.stdout


@pytest.mark.parametrize("rank", [14, 120])
@pytest.mark.parametrize("name", ["h = drop(x) A'", "dx = drop(dh A)", "dA = dh' drop(x)"])
@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_kernels_compile_for_gpus(
    name: str, rank: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, without a GPU: no register is spilled, a quarter of an SM's warps fit, tensor cores multiply.

    The largest kernels on the GPUs with the fewest registers a warp and with the least shared memory;
    benchmarks/kernel_table.md has all of them.
    """
    pytest.importorskip("triton.compiler")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import kernel_table

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    row = kernel_table.measured((rank, name, target))
    assert "error" not in row
    assert row["stack"] == 0
    assert row["occupancy"] >= 0.25
    assert row["products"] > 0


def test_a_kernel_that_spills_or_fills_an_sm_alone_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import kernel_table

    assert kernel_table.occupancy("sm_80", 128, 40 * 1024, 8) == 0.25
    assert kernel_table.occupancy("sm_80", 129, 40 * 1024, 8) == 0.125
    assert kernel_table.occupancy("sm_120", 128, 50 * 1024, 8) == pytest.approx(1 / 6, abs=1e-3)
    assert kernel_table.occupancy("sm_120", 32, 100 * 1024, 8) == 0
    good = {"target": "sm_80", "stack": 0, "occupancy": 0.25}
    wrong = [{**good, "stack": 8}, {**good, "occupancy": 0.2}, {"target": "sm_80", "error": "OutOfResources"}]
    assert kernel_table.bad([good, *wrong]) == wrong


def suits(x: torch.Tensor, *factors: torch.Tensor, p: float = 0.1, dtype: torch.dtype = torch.bfloat16) -> bool:
    return bool(triton_product.suits(x, factors, p, dtype))


def operands(
    dtype: torch.dtype = torch.bfloat16, rank: int = 4, tokens: int = 2**17, d: int = 32
) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in ((tokens, d), (rank, d), (rank, d))]


def test_what_the_kernels_take() -> None:
    assert suits(*operands())
    assert not suits(*operands(), p=0.0)
    assert suits(*operands(torch.float32), dtype=torch.float16)
    assert not suits(*operands(torch.float32), dtype=torch.float32)
    assert not suits(*operands(torch.float64))
    assert suits(*operands(rank=64))
    assert not suits(*operands(rank=65))  # 130 for the two that go down together
    assert not suits(*operands(rank=0))
    assert not suits(*operands(tokens=2**17 - 1))
    assert not suits(*operands(d=40))  # its rows don't start at whole 32 bytes
    assert not triton_product.runs_on(torch.device("cpu"))


def test_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product._fused() is triton_product
    product._fused.cache_clear()
    monkeypatch.setenv("ZIGGURAT_TRITON", "0")
    try:
        assert product._fused() is None
    finally:
        product._fused.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_against_float64() -> None:
    torch.manual_seed(0)
    shapes = (3, 2000, 1024), (3, 2000, 768), (14, 768), (1024, 14)
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    out = product.low_rank_add(*inputs, 0.1)
    assert product._parts_for(inputs[1], [inputs[2]], 0.1, torch.bfloat16) is triton_product
    torch.manual_seed(1)
    y, x, A, B = exact
    kept = triton_product.kept(triton_product.draw(x, 0.1), x.shape, 0.1) * product.masks.keep_scale(0.1)
    wanted = y + ((x * kept) @ A.T) @ B.T
    g = torch.randn_like(out)
    pairs = [(out, wanted)]
    pairs += zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, exact, g.double()), strict=True)
    for got, want in pairs:
        assert (got - want).norm() <= 2e-2 * want.norm()
