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


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["down", "up", "outer"])
def test_kernels_compile_for_gpus(name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, without a GPU: bf16 activations, float32 factors, products on tensor cores."""
    compiler = pytest.importorskip("triton.compiler")
    backend = pytest.importorskip("triton.backends.compiler")
    import triton.language as tl

    from ziggurat.lowrank import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"DROP": True, "ADD": False, "DTYPE": tl.bfloat16, "RANK": 16, "TOKENS": 64, "WIDTH": 64, "y": None}
    pointers = {"x": "*bf16", "w": "*fp32", "out": "*bf16", "h": "*bf16", "parts": "*fp32", "seed": "*i64"}
    kernel = getattr(triton_kernels, name)
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else pointers.get(n, "fp32" if n == "scale" else "i32") for n in names
    }
    source = compiler.ASTSource(kernel, signature, {(i,): constants[n] for i, n in enumerate(names) if n in constants})
    compiled = compiler.compile(source, target=backend.GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 0
    assert "mma" in compiled.asm["ptx"]
    # The smallest GPUs of compute capability 8.x have 99 KiB of shared memory for a block.
    assert compiled.metadata.shared <= 99 * 1024


def operands(dtype: torch.dtype = torch.bfloat16, rank: int = 4, tokens: int = 3) -> list[torch.Tensor]:
    shapes = (tokens, 8), (tokens, 6), (rank, 6), (8, rank)
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def test_what_the_kernels_take() -> None:
    suits = triton_product.suits
    assert suits(*operands(), torch.bfloat16)
    assert suits(*operands(torch.float32), torch.float16)
    assert not suits(*operands(torch.float32), torch.float32)
    assert not suits(*operands(torch.float64), torch.bfloat16)
    assert suits(*operands(rank=128), torch.bfloat16)
    assert not suits(*operands(rank=129), torch.bfloat16)
    assert not suits(*operands(rank=0), torch.bfloat16)
    assert not suits(*operands(tokens=0), torch.bfloat16)
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
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_on_a_gpu_against_float64(p: float) -> None:
    torch.manual_seed(0)
    shapes = (3, 100, 200), (3, 100, 136), (14, 136), (200, 14)
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    out = product.low_rank_add(*inputs, p)
    torch.manual_seed(1)
    seed = torch.empty(1, dtype=torch.int64, device="cuda").random_()
    y, x, A, B = exact
    kept = triton_product.keep_mask(x, p, seed) * product.masks.keep_scale(p) if p else 1.0
    wanted = y + ((x * kept) @ A.T) @ B.T
    g = torch.randn_like(out)
    pairs = [(out, wanted)]
    pairs += zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, exact, g.double()), strict=True)
    for got, want in pairs:
        assert (got - want).norm() <= 2e-2 * want.norm()
