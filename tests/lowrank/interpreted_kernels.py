"""The Triton kernels in Triton's interpreter on the CPU. Run by test_triton_product.py in a process of its own.

The interpreter multiplies bf16 tiles as if their codes were integers, so products are float16 or float32 here;
bf16 products need a GPU (benchmarks/gpu/kernels.py checks them). Tolerances, of the norm: by the shortest of the
dtypes of the products and of the result.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tolerance import assert_sums_agree
from ziggurat.lowrank import mask as masks
from ziggurat.lowrank import triton_kernels, triton_product
from ziggurat.lowrank.product import down_by, up_add

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def operands(*leading: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = (*leading, d_out), (*leading, d_in), (rank, d_in), (d_out, rank)
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def fused_low_rank_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float, dtype: torch.dtype, reuse_y: bool
) -> Tensor:
    """What `low_rank_add` does on a GPU."""
    (h,) = down_by(triton_product, x, [A], p, dtype)
    return up_add(y, h, B, reuse_y=reuse_y)


def mask_of_seed(x: Tensor, p: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return triton_product.kept(torch.empty(1, dtype=torch.int64).random_(), x.shape, p)


def check(inputs: tuple[Tensor, ...], p: float, dtype: torch.dtype, reuse_y: bool = False) -> None:
    """Value and gradients against the formula in float64 with the same mask."""
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    y, x, A, B = exact
    kept = mask_of_seed(x, p, 3).double() * masks.keep_scale(p) if p else 1.0
    wanted = y + ((x * kept) @ A.T) @ B.T
    torch.manual_seed(3)
    y_used = inputs[0] * 1 if reuse_y else inputs[0]
    out = fused_low_rank_add(y_used, *inputs[1:], p, dtype, reuse_y)
    assert out.dtype == inputs[0].dtype
    assert (out.data_ptr() == y_used.data_ptr()) == reuse_y
    g = torch.randn(out.shape).to(out.dtype)
    pairs = [(out, wanted)]
    pairs += zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, exact, g.double()), strict=True)
    for (got, want), like in zip(pairs, (inputs[0], *inputs), strict=True):
        assert got.dtype == like.dtype
        tolerance = max(TOLERANCE[dtype], TOLERANCE[like.dtype])
        assert (got - want).norm() <= tolerance * want.norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("leading", "d_in", "d_out", "rank"),
    [((3,), 5, 7, 1), ((2, 40), 64, 128, 16), ((2, 3, 25), 136, 70, 14), ((130,), 72, 65, 33), ((1,), 9, 300, 128)],
)
def test_value_and_gradients(leading, d_in: int, d_out: int, rank: int, p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(operands(*leading, d_in=d_in, d_out=d_out, rank=rank, dtype=dtype), p, dtype)


def test_everything_dropped() -> None:
    torch.manual_seed(0)
    y, x, A, B = operands(5, d_in=16, d_out=8, rank=2)
    out = fused_low_rank_add(y, x, A, B, 1.0, torch.float32, False)
    assert torch.equal(out, y)
    assert not any(t.any() for t in torch.autograd.grad(out.sum(), (x, A, B)))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("idle", [None, 1])
def test_linear_layers_that_share_x(p: float, idle: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of different ranks and widths, one of which may not be used, against float64; x is read once each way."""
    launched: list[str] = []
    launch = triton_product._launch
    monkeypatch.setattr(
        triton_product,
        "_launch",
        lambda kernel, *given, **c: launched.append(kernel.__name__) or launch(kernel, *given, **c),
    )
    torch.manual_seed(0)
    x = torch.randn(2, 35, 48, requires_grad=True)
    layers = [operands(2, 35, d_in=48, d_out=d, rank=r) for d, r in ((64, 5), (32, 20), (40, 3))]
    exact_x = x.detach().double().requires_grad_()
    exact = [tuple(t.detach().double().requires_grad_() for t in layer) for layer in layers]
    used = [i for i in range(3) if i != idle]
    kept = mask_of_seed(x, p, 3).double() * masks.keep_scale(p) if p else 1.0
    wanted = [exact[i][0] + ((exact_x * kept) @ exact[i][2].T) @ exact[i][3].T for i in used]
    launched.clear()
    torch.manual_seed(3)
    hs = down_by(triton_product, x, [A for _, _, A, _ in layers], p, torch.float32)
    got = [up_add(layers[i][0], hs[i], layers[i][3]) for i in used]
    gs = [torch.randn(t.shape) for t in got]
    asking = [x, *(t for i in used for t in (layers[i][0], *layers[i][2:]))]
    exact_asking = [exact_x, *(t for i in used for t in (exact[i][0], *exact[i][2:]))]
    outputs = [*got, *torch.autograd.grad(got, asking, gs)]
    reference = [*wanted, *torch.autograd.grad(wanted, exact_asking, [g.double() for g in gs])]
    for a, b in zip(outputs, reference, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12
    assert [launched.count(kernel) for kernel in ("down", "up", "outer")] == [1, 1, 1]


def test_a_models_linear_layers_share_x_on_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values of a real adapted module against the same in float64 without kernels."""
    from peft import get_peft_model

    from ziggurat import MSPLoraConfig
    from ziggurat.host import siblings
    from ziggurat.lowrank import product

    # On a processor the frozen products would be computed together too, by torch.
    monkeypatch.setattr(siblings, "can_be_whole", lambda *given: False)

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(48, d) for d in (48, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    torch.manual_seed(0)
    config = MSPLoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_weights=False)
    model = get_peft_model(torch.nn.ModuleDict({"self_attn": Attention()}), config).train()
    attention = model.base_model.model["self_attn"]
    x = torch.randn(33, 48)
    results = []
    seen: list[int] = []
    for kernels in (False, True):
        model.float() if kernels else model.double()
        model.zero_grad()
        if kernels:
            down = triton_product.down
            monkeypatch.setattr(
                triton_product, "down", lambda x, m, As, *given: seen.append(len(As)) or down(x, m, As, *given)
            )
            monkeypatch.setattr(product, "_parts_for", lambda *given: triton_product)
        inputs = x.to(torch.float32 if kernels else torch.float64).requires_grad_()
        out = attention(inputs * 1.0)
        out.square().sum().backward()
        results.append([out, inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        inputs.grad = None
    assert seen == [3]
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_however_the_sums_are_split(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_product, "_PROGRAMS", programs)
    torch.manual_seed(0)
    check(operands(130, d_in=130, d_out=70, rank=3), 0.2, torch.float32)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float16])
def test_activations_and_factors_of_different_dtypes(x_dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y, x, A, B = operands(30, d_in=40, d_out=24, rank=4)
    inputs = tuple(
        t.detach().to(d).requires_grad_() for t, d in zip((y, x, A, B), (x_dtype, x_dtype, *[factor_dtype] * 2))
    )
    check(inputs, 0.1, torch.float32)
    check(inputs, 0.1, torch.float16)


def test_layouts_that_are_not_contiguous_and_reuse() -> None:
    torch.manual_seed(0)
    y, x, A, B = (t.detach() for t in operands(4, 20, d_in=24, d_out=16, rank=3))
    check((y.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
           x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
           A.T.contiguous().T.requires_grad_(), B.T.contiguous().T.requires_grad_()), 0.2, torch.float32)  # fmt: skip
    check(tuple(t.requires_grad_() for t in (y, x, A, B)), 0.2, torch.float32, reuse_y=True)
    # A gradient of one number repeated has no strides of its own.
    inputs = operands(4, d_in=8, d_out=6, rank=2)
    got = torch.autograd.grad(fused_low_rank_add(*inputs, 0.0, torch.float32, False).sum(), inputs)
    y, x, A, B = inputs
    want = torch.autograd.grad((y + (x @ A.T) @ B.T).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        assert_sums_agree(a, b, length=8, depth=2)


@pytest.mark.parametrize("needed", range(1, 16))
def test_only_what_asks_for_a_gradient_gets_one(needed: int) -> None:
    torch.manual_seed(0)
    inputs = tuple(
        t.detach().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(operands(9, d_in=12, d_out=10, rank=2))
    )
    y, x, A, B = inputs
    kept = mask_of_seed(x, 0.4, 1) * masks.keep_scale(0.4)
    wanted = y + ((x * kept) @ A.T) @ B.T
    torch.manual_seed(1)
    out = fused_low_rank_add(*inputs, 0.4, torch.float32, False)
    asking = tuple(t for t in inputs if t.requires_grad)
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), asking), torch.autograd.grad(wanted.square().sum(), asking), strict=True
    ):
        assert_sums_agree(got, want, length=12, depth=6)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_gradients(p: float) -> None:
    torch.manual_seed(0)
    inputs = operands(6, d_in=12, d_out=10, rank=2)
    y, x, A, B = inputs
    kept = mask_of_seed(x, p, 1) * masks.keep_scale(p) if p else 1.0
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        out = fused_low_rank_add(*inputs, p, torch.float32, False) if fused else y + ((x * kept) @ A.T) @ B.T
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))  # type: ignore[arg-type]
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    inputs = operands(20, d_in=32, d_out=32, rank=4)

    def twice(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        first = fused_low_rank_add(y, x, A, B, 0.5, torch.float32, False)
        return fused_low_rank_add(first * 1, torch.tanh(first), A, B, 0.5, torch.float32, True)

    torch.manual_seed(1)
    plain = torch.autograd.grad(twice(*inputs).square().sum(), inputs)
    torch.manual_seed(1)
    out = checkpoint(twice, *inputs, use_reentrant=use_reentrant)
    out.square().sum().backward()  # type: ignore[union-attr]
    for t, want in zip(inputs, plain, strict=True):
        assert torch.equal(t.grad, want)  # type: ignore[arg-type]


def test_keeps_x_the_small_product_and_a_seed() -> None:
    y, x, A, B = operands(50, d_in=96, d_out=80, rank=4)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = [fused_low_rank_add(y, x, A, B, 0.1, torch.float32, False) for _ in "qv"]
    assert len(alive) == 2
    for t in (x, A, B):
        kept.pop(t.untyped_storage().data_ptr())
    assert sorted(kept.values()) == [8, 8, 50 * 4 * 4, 50 * 4 * 4]


def test_entries_are_dropped_with_the_probability_and_independently() -> None:
    x = torch.empty(512, 512)
    n, p = x.numel(), 0.25
    dropped = 1 - mask_of_seed(x, p, 0).float()
    bound = 5 * p / n**0.5
    assert abs(dropped.mean() - p) < bound
    # Neighbours in one draw of 128 bits, in the next draw, and in the next row.
    for step in (1, 2, 3, 4, 5, 6, 7, 8, 512):
        flat = dropped.flatten()
        assert abs((flat[:-step] * flat[step:]).mean() - p * p) < bound
    # Every one of the 8 places in a draw.
    for place in range(8):
        assert abs(dropped[:, place::8].mean() - p) < bound * 8**0.5
    other = 1 - mask_of_seed(x, p, 1).float()
    assert abs((dropped * other).mean() - p * p) < bound


def test_the_mask_does_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(100, 300)
    wanted = mask_of_seed(x, 0.5, 0)
    monkeypatch.setattr(triton_kernels, "TOKENS", 16)
    monkeypatch.setattr(triton_kernels, "WIDTH", 32)
    assert torch.equal(mask_of_seed(x, 0.5, 0), wanted)
