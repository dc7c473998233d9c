"""The one operation against its formula: values, gradients, shapes, dtypes, kept tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from tolerance import assert_sums_agree, rounding
from ziggurat.errors import ConfigError
from ziggurat.lowrank import mask as masks
from ziggurat.lowrank import plain_product
from ziggurat.lowrank.product import composed, low_rank_add, owns_output

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def operands(
    *leading: int, d_in: int = 6, d_out: int = 5, rank: int = 2, dtype: torch.dtype = torch.float64, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, A, B."""
    shapes = (*leading, d_out), (*leading, d_in), (rank, d_in), (d_out, rank)
    y, x, A, B = (torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)
    return y, x, A, B


def by_formula(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float, seed: int) -> Tensor:
    """The definition, with the mask that `low_rank_add` draws from this seed."""
    torch.manual_seed(seed)
    kept = masks.apply(torch.ones_like(x), masks.draw(x, p)) * masks.keep_scale(p) if p else 1.0
    return y + ((x * kept) @ A.T) @ B.T


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(99)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_gradients_once_and_twice(leading: tuple[int, ...], p: float) -> None:
    torch.manual_seed(0)

    def seeded(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return low_rank_add(y, x, A, B, p)

    inputs = operands(*leading)
    assert gradcheck(seeded, inputs)
    assert gradgradcheck(seeded, inputs)


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5)),
    p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_are_the_formulas(
    leading: list[int], sizes: tuple[int, int, int], p: float, seed: int
) -> None:
    d_in, d_out, rank = sizes
    inputs = operands(*leading, d_in=d_in, d_out=d_out, rank=rank)
    wanted = by_formula(*inputs, p, seed)
    torch.manual_seed(seed)
    out = low_rank_add(*inputs, p)
    torch.testing.assert_close(out, wanted, **EXACT)
    for got, want in zip(gradients(out, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
def test_many_tokens_in_parts(x_dtype: torch.dtype, p: float) -> None:
    """x is larger than what is masked or converted at a time, and no multiple of it."""
    torch.manual_seed(3)
    y, x, A, B = operands(13, 59, d_in=801, d_out=40, rank=6)
    x = x.detach().to(x_dtype).requires_grad_()
    assert x.numel() * 8 > 2 * plain_product._PART
    wanted = by_formula(y, x.double(), A, B, p, seed=4)
    torch.manual_seed(4)
    out = low_rank_add(y, x, A, B, p)
    torch.testing.assert_close(out, wanted, **EXACT)
    for got, want in zip(gradients(out, (y, x, A, B)), gradients(wanted, (y, x, A, B)), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@settings(max_examples=16)
@given(needed=st.tuples(*[st.booleans()] * 4), p=st.sampled_from([0.0, 0.4]))
def test_only_what_asks_for_a_gradient_gets_one(needed: tuple[bool, ...], p: float) -> None:
    torch.manual_seed(5)
    inputs = tuple(t.detach().requires_grad_(n) for t, n in zip(operands(2, 3), needed, strict=True))
    wanted = by_formula(*inputs, p, seed=6)
    torch.manual_seed(6)
    out = low_rank_add(*inputs, p)
    assert out.requires_grad == any(needed)
    asking = tuple(t for t in inputs if t.requires_grad)
    if asking:
        for got, want in zip(gradients(out, asking), gradients(wanted, asking), strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_layouts_that_are_not_contiguous(p: float) -> None:
    torch.manual_seed(7)
    y, x, A, B = operands(4, 3, grad=False)
    twisted = (
        y.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        A.T.contiguous().T,
        torch.stack([B, B], dim=-1)[..., 0],
    )
    inputs = tuple(t.requires_grad_() for t in twisted)
    assert not any(t.is_contiguous() for t in inputs)
    torch.manual_seed(8)
    out = low_rank_add(*inputs, p, reuse_y=True)
    wanted = by_formula(*inputs, p, seed=8)
    torch.testing.assert_close(out, wanted, **EXACT)
    for got, want in zip(gradients(out, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_a_gradient_that_is_one_number_repeated() -> None:
    inputs = operands(2, 3)
    low_rank_add(*inputs).sum().backward()
    wanted = torch.autograd.grad(composed(*inputs).sum(), inputs)
    for t, want in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(t.grad, want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_shorter_dtypes(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(9)
    inputs = tuple(t.detach().to(dtype).requires_grad_() for t in operands(4, 8, d_in=64, d_out=48, rank=4))
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    wanted = by_formula(*exact, p, seed=10)
    torch.manual_seed(10)
    out = low_rank_add(*inputs, p)
    assert out.dtype == dtype
    assert_sums_agree(out.double(), wanted, length=64, depth=3, dtype=dtype)
    for got, want, t in zip(gradients(out, inputs), gradients(wanted.to(dtype), exact), inputs, strict=True):
        assert got.dtype == t.dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < rounding(64, 2, dtype)


def test_float16_runs() -> None:
    inputs = operands(3, dtype=torch.float16)
    out = low_rank_add(*inputs, 0.1)
    assert out.dtype == torch.float16
    assert all(g.dtype == torch.float16 and g.isfinite().all() for g in gradients(out, inputs))


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Sums of float32 in other orders, each rounded to the dtype: at most one unit in the last place between them."""
    size = float(expected.detach().abs().max())
    one_unit = 0.0 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=one_unit, atol=size * rounding(32, 3))


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_activations_shorter_than_the_factors(y_dtype: torch.dtype, p: float) -> None:
    """As over a quantised base: x in bf16, float32 factors. The products are float32, rounded once at the end."""
    torch.manual_seed(11)
    y, x, A, B = operands(2, 40, d_in=32, d_out=24, rank=4, dtype=torch.float32)
    y, x = y.detach().to(y_dtype).requires_grad_(), x.detach().bfloat16().requires_grad_()
    wanted = by_formula(y, x.float(), A, B, p, seed=12).to(y_dtype)
    torch.manual_seed(12)
    out = low_rank_add(y, x, A, B, p)
    assert out.dtype == y_dtype
    assert_rounded_once(out, wanted)
    got, want = gradients(out, (y, x, A, B)), gradients(wanted, (y, x, A, B))
    assert [g.dtype for g in got] == [y_dtype, torch.bfloat16, torch.float32, torch.float32]
    assert_rounded_once(got[1], want[1])
    for g, w in zip(got[2:], want[2:], strict=True):
        assert_sums_agree(g, w, length=80, depth=3)


def kept_bytes(run) -> dict[int, int]:
    """The storages autograd keeps while ``run()`` is alive, with their sizes."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = run()
    del alive
    return kept


@pytest.mark.parametrize("p", [0.0, 0.1, 0.2])
def test_keeps_x_once_the_small_product_and_the_mask(p: float) -> None:
    """The mask as bits, or as 32 bits for each of few dropped entries (with some more, up to five deviations)."""
    y, x, A, B = operands(16, 8, d_in=96, d_out=80, rank=4, dtype=torch.float32)
    kept = kept_bytes(lambda: [low_rank_add(y, x, A, B, p) for _ in "qv"])
    for t in (x, A, B):
        assert kept.pop(t.untyped_storage().data_ptr()) == t.nbytes
    products = 2 * 16 * 8 * 4 * 4
    entries = 2 * 16 * 8 * 96
    if p == 0.1:
        assert 0 < sum(kept.values()) - products <= 4 * (entries * p + 10 * (entries * p) ** 0.5 + 16)
    else:
        assert sum(kept.values()) == products + (entries // 8 if p else 0)


def test_keeps_nothing_without_trainable_factors_but_the_factors() -> None:
    y, x, A, B = operands(16, 8, dtype=torch.float32)
    kept = kept_bytes(lambda: low_rank_add(y, x, A.detach(), B.detach()))
    assert set(kept) == {A.untyped_storage().data_ptr(), B.untyped_storage().data_ptr()}


def test_reusing_the_output_of_a_linear() -> None:
    torch.manual_seed(13)
    linear = nn.Linear(6, 5).double().requires_grad_(False)
    assert owns_output(linear)
    _, x, A, B = operands(2, 3)
    y = linear(x)
    out = low_rank_add(y, x, A, B, reuse_y=True)
    assert out.data_ptr() == y.data_ptr()
    wanted = composed(linear(x), x, A, B)
    torch.testing.assert_close(out, wanted, **EXACT)
    for got, want in zip(gradients(out, (x, A, B)), gradients(wanted, (x, A, B)), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    # What comes after may work in place, as on any tensor.
    (low_rank_add(linear(x), x, A, B, reuse_y=True) * 1.0).mul_(2).sum().backward()
    low_rank_add(linear(x), x, A, B, reuse_y=True).mul_(2).view(-1).add_(1).sum().backward()


def test_reusing_what_a_backward_needs_is_an_error_and_no_wrong_gradient() -> None:
    y, x, A, B = operands(3)
    out = low_rank_add(y.exp(), x, A, B, reuse_y=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_whose_output_may_be_reused() -> None:
    hooked, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert owns_output(nn.Linear(2, 2))
    assert not any(owns_output(m) for m in (hooked, patched, nn.Identity(), nn.Bilinear(2, 2, 2)))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not owns_output(nn.Linear(2, 2))
    finally:
        handle.remove()


def test_without_reuse_y_stays_as_it_was() -> None:
    y, x, A, B = operands(3, grad=False)
    before = y.clone()
    low_rank_add(y, x, A, B)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 5), (3, 6), (2, 6), (5, 2)),
        ((3, 5), (1, 3, 6), (2, 6), (5, 2)),
        ((3, 5), (3, 7), (2, 6), (5, 2)),
        ((3, 4), (3, 6), (2, 6), (5, 2)),
        ((3, 5), (3, 6), (2, 6), (5, 3)),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match=r"x must be .* with the same leading dimensions"):
        low_rank_add(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability(p: float) -> None:
    with pytest.raises(ConfigError, match="it is a probability, give 0 to 1"):
        low_rank_add(*operands(3), p)


@pytest.mark.parametrize("reuse_y", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_the_result_may_be_changed_in_place(dtypes: tuple[torch.dtype, torch.dtype], reuse_y: bool) -> None:
    base, factors = dtypes
    y, x = (torch.randn(2, 3, size, dtype=base, requires_grad=True) for size in (5, 6))
    A, B = (torch.randn(shape, dtype=factors, requires_grad=True) for shape in ((2, 6), (5, 2)))

    def slopes(change: bool) -> tuple[Tensor, ...]:
        out = low_rank_add(y * 1.0, x, A, B, reuse_y=reuse_y)
        return gradients(torch.relu_(out) if change else torch.relu(out), (y, x, A, B))

    for got, wanted in zip(slopes(True), slopes(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_default_device_elsewhere() -> None:
    y, x, A, B = operands(3)
    torch.set_default_device("meta")
    try:
        out = low_rank_add(y, x, A, B, 0.5)
    finally:
        torch.set_default_device(None)
    assert out.device.type == "cpu"
