"""Spectra from factors against the dense definition, and against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tolerance import assert_sums_agree
from ziggurat.errors import ConfigError, ZigguratError
from ziggurat.lowrank.pair import FactorPair
from ziggurat.lowrank.spectrum import (
    effective_rank,
    factored_svd,
    numerical_rank,
    singular_values,
    spectrum_kl,
    stable_rank,
    top_k_share,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# Exact zeros, and values that scaling does not push below the smallest number.
values = st.just(0.0) | st.floats(1e-200, 1e3)
spectra = st.lists(values, min_size=1, max_size=12).map(lambda v: torch.tensor(v, dtype=torch.float64))


def factors(rank: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float64) -> FactorPair:
    return FactorPair(torch.randn(rank, d_in, dtype=dtype), torch.randn(d_out, rank, dtype=dtype))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_singular_values_are_those_of_the_dense_product(rank: int, d_in: int, d_out: int, seed: int) -> None:
    torch.manual_seed(seed)
    A, B = factors(rank, d_in, d_out)
    dense = torch.linalg.svdvals(B @ A)
    s = singular_values(A, B)
    assert s.shape == (min(rank, d_in, d_out),)
    torch.testing.assert_close(s, dense[: len(s)], **EXACT)
    torch.testing.assert_close(dense[len(s) :], torch.zeros_like(dense[len(s) :]), **EXACT)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_factored_svd_is_an_svd(rank: int, d_in: int, d_out: int, seed: int) -> None:
    torch.manual_seed(seed)
    A, B = factors(rank, d_in, d_out)
    U, s, V = factored_svd(A, B)
    torch.testing.assert_close(U @ s.diag() @ V.T, B @ A, **EXACT)
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(s), dtype=torch.float64), **EXACT)
    torch.testing.assert_close(s, singular_values(A, B), **EXACT)


def test_large_update_in_float32() -> None:
    torch.manual_seed(0)
    A, B = factors(8, 512, 300, torch.float32)
    wanted = torch.linalg.svdvals(B.double() @ A.double())[:8].float()
    assert_sums_agree(singular_values(A, B), wanted, length=512, depth=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    A, B = factors(4, 20, 10, dtype)
    s = singular_values(A, B)
    assert s.dtype == torch.float32
    assert torch.equal(s, singular_values(A.float(), B.float()))
    for measure in (effective_rank, stable_rank, lambda t: top_k_share(t, 2)):
        assert measure(torch.ones(3, dtype=dtype)).dtype == torch.float32


def test_batches_of_pairs() -> None:
    A, B = torch.randn(3, 2, 4, 9, dtype=torch.float64), torch.randn(3, 2, 7, 4, dtype=torch.float64)
    s = singular_values(A, B)
    assert s.shape == (3, 2, 4)
    torch.testing.assert_close(s[1, 1], singular_values(A[1, 1], B[1, 1]), **EXACT)
    torch.testing.assert_close(effective_rank(s)[1, 1], effective_rank(s[1, 1]), **EXACT)
    torch.testing.assert_close(top_k_share(s, 2)[2, 0], top_k_share(s[2, 0], 2), **EXACT)


def test_closed_forms() -> None:
    flat = torch.full((8,), 3.0, dtype=torch.float64)
    single = torch.tensor([5.0, 0, 0, 0], dtype=torch.float64)
    falling = torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64)
    assert effective_rank(flat).item() == pytest.approx(8, abs=1e-12)
    assert effective_rank(single) == 1
    shares = (0.5, 0.375, 0.125)
    assert effective_rank(falling).item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), abs=1e-12)
    assert stable_rank(flat) == 8
    assert stable_rank(single) == 1
    assert stable_rank(falling).item() == pytest.approx(26 / 16)
    assert [top_k_share(falling, k).item() for k in (1, 2, 3, 9)] == [0.5, 0.875, 1.0, 1.0]


def test_an_update_of_zeros() -> None:
    zeros = singular_values(torch.randn(4, 9), torch.zeros(7, 4))
    assert torch.equal(zeros, torch.zeros(4))
    assert effective_rank(zeros) == stable_rank(zeros) == top_k_share(zeros, 2) == 0
    assert spectrum_kl(zeros, torch.ones(4)).isnan()
    assert spectrum_kl(torch.ones(4), zeros).isnan()
    assert numerical_rank(zeros) == 0


@given(spectra, st.floats(1e-3, 1e3))
def test_scaling_an_update_changes_no_shape_of_its_spectrum(s: Tensor, factor: float) -> None:
    for measure in (effective_rank, stable_rank, lambda t: top_k_share(t, 2)):
        torch.testing.assert_close(measure(s * factor), measure(s), rtol=1e-9, atol=1e-9)
    if s.any():
        assert 1 - 1e-9 <= effective_rank(s) <= len(s) + 1e-9
        assert 1 - 1e-9 <= stable_rank(s) <= len(s) + 1e-9


def test_top_k_needs_a_k() -> None:
    with pytest.raises(ConfigError, match="k=0"):
        top_k_share(torch.ones(3), 0)


def test_kl_by_hand() -> None:
    p, q = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert spectrum_kl(p, q, smoothing=0).item() == pytest.approx(by_hand, abs=1e-12)
    assert spectrum_kl(p, q).item() == pytest.approx(by_hand, abs=1e-10)
    assert spectrum_kl(p, 7 * p.flip(0), smoothing=0) == 0


def test_kl_where_a_direction_is_missing() -> None:
    long, short = torch.ones(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert spectrum_kl(long, short, smoothing=0) == math.inf
    assert spectrum_kl(short, long, smoothing=0).item() == pytest.approx(math.log(2), abs=1e-12)
    assert spectrum_kl(long, short).item() == pytest.approx(0.5 * math.log(0.5) - 0.5 * math.log(4e-12), abs=1e-6)


@given(spectra.filter(lambda s: s.sum() > 1e-6), spectra.filter(lambda s: s.sum() > 1e-6))
def test_kl_is_finite_and_never_negative(s_i: Tensor, s_j: Tensor) -> None:
    assert 0 <= spectrum_kl(s_i, s_j) < math.inf
    assert spectrum_kl(s_i, s_i) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["A", "B"])
def test_factors_that_are_not_finite(bad: float, which: str) -> None:
    pair = factors(2, 5, 4)
    getattr(pair, which)[0, 0] = bad
    for function in (singular_values, factored_svd):
        with pytest.raises(ZigguratError, match=rf"factor {which} \(.*\) has NaN or infinite entries"):
            function(*pair)


def test_nan_in_a_spectrum_is_passed_on() -> None:
    s = torch.tensor([1.0, math.nan])
    for value in (top_k_share(s, 1), effective_rank(s), stable_rank(s), spectrum_kl(s, torch.ones(2))):
        assert value.isnan()


def test_factors_of_different_rank() -> None:
    with pytest.raises(ConfigError, match=r"A \(3, 5\) and B \(4, 2\)"):
        singular_values(torch.ones(3, 5), torch.ones(4, 2))
