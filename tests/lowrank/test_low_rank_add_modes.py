"""The one operation under torch's modes: autocast, checkpointing, compile, no grad, subclasses."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tolerance import assert_sums_agree
from ziggurat.lowrank.product import composed, low_rank_add


class Adapted(nn.Module):
    def __init__(self, p: float = 0.0, reuse_y: bool = False, d: int = 16, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, d) / d**0.5)
        self.B = nn.Parameter(torch.randn(d, rank))
        self.p, self.reuse_y = p, reuse_y

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_add(self.base(x), x, self.A, self.B, self.p, reuse_y=self.reuse_y)


def step(model: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    """The output and all gradients of a training step whose random numbers start at ``seed``."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("reuse_y", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_recomputes_the_same_dropout(p: float, use_reentrant: bool, reuse_y: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(p, reuse_y), nn.Tanh(), Adapted(p, reuse_y))
    x = torch.randn(4, 5, 16)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    for got, wanted in zip(step(Checkpointed(), x), step(model, x), strict=True):
        assert torch.equal(got, wanted)


def test_dropout_is_there_differs_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    model, x = Adapted(0.4), torch.randn(4, 5, 16)
    first, again, other = step(model, x, 1), step(model, x, 1), step(model, x, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_without_gradients_the_value_is_the_same(p: float) -> None:
    torch.manual_seed(0)
    model, x = Adapted(p), torch.randn(4, 5, 16)
    torch.manual_seed(1)
    with_gradients = model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with mode():
            out = model(x)
        assert torch.equal(out, with_gradients)
        assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("y_dtype", [torch.float32, None])
def test_autocast_as_linear_does_it(dtype: torch.dtype, y_dtype: torch.dtype | None) -> None:
    """Float32 x and factors: products in autocast's dtype, gradients in the tensors' own."""
    torch.manual_seed(0)
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((4, 5, 32), (3, 32), (24, 3)))
    y = torch.randn(4, 5, 24).to(y_dtype or dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = low_rank_add(y, x, A, B)
        product = F.linear(F.linear(x, A), B)
    assert product.dtype == dtype
    assert out.dtype == y.dtype
    wanted = (y + product).to(y.dtype)
    # The sum is rounded once here and twice there: one unit in the last place of entries up to about 40.
    torch.testing.assert_close(out.float(), wanted.float(), rtol=2e-2, atol=0.2)
    g = torch.randn(out.shape).to(out.dtype)
    got = torch.autograd.grad(out, (y, x, A, B), g)
    for grad, want, t in zip(got, torch.autograd.grad(wanted, (y, x, A, B), g), (y, x, A, B), strict=True):
        assert grad.dtype == t.dtype
        assert (grad - want).float().norm() <= 2e-2 * want.float().norm()


def test_autocast_leaves_double_precision_alone() -> None:
    y, x, A, B = (torch.randn(s, dtype=torch.float64) for s in ((3, 5), (3, 6), (2, 6), (5, 2)))
    wanted = low_rank_add(y, x, A, B)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low_rank_add(y, x, A, B), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_autocast_checkpointing_and_dropout_together(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Adapted(0.3, reuse_y=True), torch.randn(4, 5, 16)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = step(Checkpointed(), x), step(model, x)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Adapted(0.0, reuse_y=True), torch.randn(4, 5, 16)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 3):
        for got, wanted in zip(step(compiled, x[:, :tokens]), step(model, x[:, :tokens]), strict=True):
            assert_sums_agree(got, wanted, length=20, depth=4)
    with torch.no_grad():
        assert_sums_agree(compiled(x), model(x), length=16, depth=3)


def test_compiled_dropout_drops_and_is_unbiased() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    add = torch.compile(low_rank_add, fullgraph=True, backend="aot_eager")
    eye, x = torch.eye(8), torch.ones(4000, 8)
    out = add(torch.zeros_like(x), x, eye, eye, 0.25)
    values, counts = out.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0, 1 / 0.75]), rtol=1e-5, atol=1e-6)
    assert abs(counts[0].item() / out.numel() - 0.25) < 0.02


def test_exports_in_one_graph() -> None:
    model, x = Adapted().eval(), torch.randn(2, 5, 16)
    exported = torch.export.export(model, (x,)).module()
    assert_sums_agree(exported(x), model(x), length=16, depth=3)


def test_tensors_without_memory() -> None:
    with torch.device("meta"):
        model, x = Adapted(0.1), torch.randn(2, 5, 16)
        out = model(x)
        out.sum().backward()
    assert out.shape == (2, 5, 16)
    assert model.A.grad.shape == model.A.shape  # type: ignore[union-attr]
    with FakeTensorMode():
        out = Adapted(0.1)(torch.randn(2, 5, 16))
        assert out.shape == (2, 5, 16)


def test_two_adapters_on_one_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, requires_grad=True)
    first, second = Adapted(reuse_y=True), Adapted(reuse_y=True)
    y = low_rank_add(first(x), x, second.A, second.B, reuse_y=True)
    wanted = composed(composed(first.base(x), x, first.A, first.B), x, second.A, second.B)
    assert_sums_agree(y, wanted, length=16, depth=5)
    inputs = (x, first.A, first.B, second.A, second.B)
    got, want = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, wanted))
    for g, w in zip(got, want, strict=True):
        assert_sums_agree(g, w, length=16, depth=10)
