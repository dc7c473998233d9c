"""Frozen product and update as one operation: the layer's bits, the formulas' gradients, and only where it may be."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ziggurat.lowrank import mask as masks
from ziggurat.lowrank import plain_product
from ziggurat.lowrank.pair import FactorPair
from ziggurat.lowrank.product import down, up_add
from ziggurat.lowrank.whole import can_be_whole, whole


def layers(d_in: int, d_outs: list[int], bias: bool = True, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    return [nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False) for d_out in d_outs]


def pairs(d_in: int, d_outs: list[int], dtype: torch.dtype = torch.float64) -> list[FactorPair]:
    """Of ranks 2, 3, 4, ..."""
    return [
        FactorPair(
            torch.randn(rank, d_in, dtype=dtype).requires_grad_(),
            torch.randn(d_out, rank, dtype=dtype).requires_grad_(),
        )
        for rank, d_out in enumerate(d_outs, start=2)
    ]


def by_formula(x: Tensor, bases: list[nn.Linear], given_pairs: list[FactorPair], p: float, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    kept = masks.apply(torch.ones_like(x), masks.draw(x, p)) * masks.keep_scale(p) if p else 1.0
    return [base(x) + (x * kept) @ A.T @ B.T for base, (A, B) in zip(bases, given_pairs, strict=True)]


def seeded(x: Tensor, bases: list[nn.Linear], given_pairs: list[FactorPair], p: float, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return whole(x, bases, given_pairs, p)


def slopes(ys: Any, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    weights = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) for y in ys]
    sums = [(y * w).sum() for y, w in zip(ys, weights, strict=True) if y.requires_grad]
    return torch.autograd.grad(sums, inputs, allow_unused=True)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_values_and_gradients_are_the_formulas(
    leading: list[int], d_outs: list[int], d_in: int, p: float, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, bases = torch.randn(*leading, d_in, dtype=torch.float64).requires_grad_(), layers(d_in, d_outs, bias)
    factors = pairs(d_in, d_outs)
    inputs = [x, *(t for pair in factors for t in pair)]
    ys, wanted = seeded(x * 1.0, bases, factors, p, seed), by_formula(x, bases, factors, p, seed)
    for got, expected in zip((*ys, *slopes(ys, inputs)), (*wanted, *slopes(wanted, inputs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tokens_have_the_bits_of_the_layer_and_its_update(p: float, dtype: torch.dtype) -> None:
    """In several parts where x is dropped out; the gradients differ by the order of their sums alone."""
    torch.manual_seed(0)
    x = torch.randn(3, 1000, 160, dtype=dtype).requires_grad_()
    assert x.numel() * dtype.itemsize > plain_product._PART // 2
    bases, factors = layers(160, [64, 48], dtype=dtype), pairs(160, [64, 48], dtype)
    ys = seeded(x, bases, factors, p, 5)
    torch.manual_seed(5)
    hs = down(x, [A for A, _ in factors], p)
    for y, base, h, (_, B) in zip(ys, bases, hs, factors, strict=True):
        assert torch.equal(y, up_add(base(x), h, B))
    inputs = [x, *(t for pair in factors for t in pair)]
    double = [t.detach().double().requires_grad_() for t in inputs]
    in_double = [FactorPair(*double[i : i + 2]) for i in (1, 3)]
    wanted = by_formula(double[0], [copy.deepcopy(base).double() for base in bases], in_double, p, 5)
    eps = torch.finfo(dtype).eps
    for got, expected in zip(slopes(ys, inputs), slopes(wanted, double), strict=True):
        assert got is not None and expected is not None
        assert (got - expected).norm() <= 200 * eps * expected.norm()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
def test_gradients_once_and_twice(p: float) -> None:
    torch.manual_seed(1)
    bases, factors = layers(4, [3, 2]), pairs(4, [3, 2])
    x = torch.randn(2, 5, 4, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return seeded(x, bases, [FactorPair(*flat[:2]), FactorPair(*flat[2:])], p, 3)

    inputs = (x, *(t for pair in factors for t in pair))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("p", [0.0, 0.1])
@given(st.lists(st.booleans(), min_size=5, max_size=5).filter(any))
def test_only_what_asks_for_a_gradient_gets_one(p: float, needed: list[bool]) -> None:
    torch.manual_seed(2)
    bases, factors = layers(4, [3, 2]), pairs(4, [3, 2])
    every = [torch.randn(6, 4, dtype=torch.float64), *(t.detach() for pair in factors for t in pair)]
    for t, need in zip(every, needed, strict=True):
        t.requires_grad_(need)
    given_pairs = [FactorPair(*every[1:3]), FactorPair(*every[3:])]
    asked = [t for t, need in zip(every, needed, strict=True) if need]
    got = slopes(seeded(every[0], bases, given_pairs, p, 3), asked)
    wanted = slopes(by_formula(every[0], bases, given_pairs, p, 3), asked)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
def test_a_backward_through_one_output_leaves_the_others_theirs(p: float) -> None:
    torch.manual_seed(4)
    x, bases, factors = torch.randn(7, 4, dtype=torch.float64).requires_grad_(), layers(4, [3, 2]), pairs(4, [3, 2])
    ys, wanted = seeded(x, bases, factors, p, 3), by_formula(x, bases, factors, p, 3)
    for i in (1, 0):
        inputs = [x, *factors[i]]
        for got, expected in zip(slopes([ys[i]], inputs), slopes([wanted[i]], inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        (unused,) = slopes([wanted[i]], [factors[1 - i].A])
        assert unused is None


def test_results_may_be_changed_in_place_and_x_may_not() -> None:
    torch.manual_seed(5)
    x, bases, factors = torch.randn(7, 4, dtype=torch.float64).requires_grad_(), layers(4, [3]), pairs(4, [3])
    (y,) = whole(x, bases, factors, 0.0)
    y += 1
    y.sum().backward()
    inner = x * 1.0
    (y,) = whole(inner, bases, factors, 0.0)
    inner += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_second_derivative_after_a_first_backward(p: float) -> None:
    """Through the other output: right if the first backward keeps the graph, and refused if it has freed it."""
    torch.manual_seed(6)
    x, bases, factors = torch.randn(7, 4, dtype=torch.float64).requires_grad_(), layers(4, [3, 2]), pairs(4, [3, 2])

    def twice(ys: Any, retain: bool) -> Tensor:
        ys[0].square().sum().backward(retain_graph=retain)
        (slope,) = torch.autograd.grad(ys[1].square().sum(), factors[1].B, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    wanted = twice(by_formula(x, bases, factors, p, 3), True)
    torch.testing.assert_close(twice(seeded(x, bases, factors, p, 3), True), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="second time"):
        twice(seeded(x, bases, factors, p, 3), False)


def test_an_output_that_no_backward_reaches_leaves_no_cycle() -> None:
    """The node keeps what the other output's backward would need; without the node all of it is freed at once."""
    factors, bases = pairs(4, [3, 2]), layers(4, [3, 2])
    inner = torch.randn(7, 4, dtype=torch.float64).requires_grad_() * 1.0
    seen = weakref.ref(inner)
    gc.collect()
    gc.disable()
    try:
        ys = whole(inner, bases, factors, 0.0)
        ys[0].sum().backward()
        del ys, inner
        assert seen() is None
    finally:
        gc.enable()


def test_weights_replaced_before_the_backward_are_those_that_the_forward_read() -> None:
    """A merge gives the parameter other memory."""
    torch.manual_seed(7)
    x, bases, factors = torch.randn(7, 4, dtype=torch.float64).requires_grad_(), layers(4, [3]), pairs(4, [3])
    wanted = slopes(by_formula(x, bases, factors, 0.0, 3), [x])
    ys = whole(x, bases, factors, 0.0)
    bases[0].weight.data = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(slopes(ys, [x]), wanted, rtol=1e-10, atol=1e-10)
    ys = whole(x, bases, factors, 0.0)
    bases[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="frozen weight"):
        slopes(ys, [x])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
def test_a_backward_within_autocast(p: float) -> None:
    torch.manual_seed(8)
    x, bases = torch.randn(7, 4).requires_grad_(), layers(4, [3, 2], dtype=torch.float32)
    factors = pairs(4, [3, 2], torch.float32)
    inputs = [x, *(t for pair in factors for t in pair)]
    wanted, ys = slopes(seeded(x, bases, factors, p, 3), inputs), seeded(x, bases, factors, p, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = slopes(ys, inputs)
    for a, b in zip(got, wanted, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b)


@contextmanager
def _within(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _with_forward(base: nn.Linear) -> nn.Linear:
    base.forward = lambda x: x  # type: ignore[method-assign]
    return base


def _with_a_learning_bias(base: nn.Linear) -> nn.Linear:
    base.bias.requires_grad_(True)
    return base


def _hooked(register: str) -> Callable[[nn.Linear], nn.Linear]:
    def hook(base: nn.Linear) -> nn.Linear:
        getattr(base, register)(lambda *given: None)
        return base

    return hook


@pytest.mark.parametrize(
    "change",
    [
        _with_forward,
        _hooked("register_forward_hook"),
        _hooked("register_forward_pre_hook"),
        _hooked("register_full_backward_hook"),
        _hooked("register_full_backward_pre_hook"),
        lambda base: base.requires_grad_(True),
        _with_a_learning_bias,
        lambda base: base.float(),
        lambda base: Doubled(4, 3).double().requires_grad_(False),
        lambda base: base.to("meta"),
    ],
)
def test_a_layer_that_is_more_than_its_product_stays_apart(change: Callable[[nn.Linear], nn.Module]) -> None:
    (base,), (pair,), x = layers(4, [3]), pairs(4, [3]), torch.randn(7, 4, dtype=torch.float64)
    assert can_be_whole(base, pair, x)
    assert not can_be_whole(change(base), pair, x)


def test_circumstances_in_which_torch_has_more_to_do() -> None:
    (base,), (pair,), x = layers(4, [3]), pairs(4, [3]), torch.randn(7, 4, dtype=torch.float64)
    assert not can_be_whole(base, FactorPair(pair.A.float(), pair.B), x)
    assert not can_be_whole(base, pair, x.to("meta"))
    assert not can_be_whole(base, pair, torch.randn(7, 5, dtype=torch.float64))
    assert not can_be_whole(*layers(4, [3], dtype=torch.bfloat16), pair, x.bfloat16())
    with torch.inference_mode():
        assert not can_be_whole(base, pair, torch.randn(7, 4, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_be_whole(base, pair, x)
    module = nn.modules.module
    for register in ("register_module_forward_pre_hook", "register_module_forward_hook"):
        with _within(getattr(module, register)(lambda *given: None)):
            assert not can_be_whole(base, pair, x)
    with _within(module.register_module_full_backward_hook(lambda *given: None)):
        assert not can_be_whole(base, pair, x)
    assert can_be_whole(base, pair, x)
