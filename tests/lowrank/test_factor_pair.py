"""Factor pairs: composing them keeps the sum of their deltas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.errors import ConfigError
from ziggurat.lowrank.pair import FactorPair, delta, pad, stack


def random_pair(rank: int, d_in: int = 7, d_out: int = 5, dtype: torch.dtype = torch.float64) -> FactorPair:
    return FactorPair(torch.randn(rank, d_in, dtype=dtype), torch.randn(d_out, rank, dtype=dtype))


@given(ranks=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_delta_of_a_stack_is_the_scaled_sum(ranks: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    pairs = [random_pair(rank) for rank in ranks]
    scales = torch.randn(len(ranks)).tolist()
    stacked = stack(pairs, scales)
    assert stacked.A.shape == (sum(ranks), 7)
    assert stacked.B.shape == (5, sum(ranks))
    wanted = sum((s * B @ A for (A, B), s in zip(pairs, scales, strict=True)), torch.zeros(5, 7, dtype=torch.float64))
    torch.testing.assert_close(delta(stacked), wanted, rtol=1e-10, atol=1e-10)


def test_stack_gives_every_tier_its_gradient() -> None:
    pairs = [FactorPair(*(t.requires_grad_() for t in random_pair(rank))) for rank in (4, 2, 1)]
    scales = [2.0, 1.0, 0.5]
    weight = torch.randn(5, 7, dtype=torch.float64)
    (delta(stack(pairs, scales)) * weight).sum().backward()
    for (A, B), scale in zip(pairs, scales, strict=True):
        torch.testing.assert_close(A.grad, scale * B.detach().T @ weight, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(B.grad, scale * weight @ A.detach().T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("pairs", "scales"),
    [
        ([], []),
        ([random_pair(2)], [1.0, 1.0]),
        ([random_pair(2), random_pair(2, d_in=8)], [1.0, 1.0]),
        ([random_pair(2), random_pair(2, d_out=6)], [1.0, 1.0]),
        ([FactorPair(torch.zeros(2, 7), torch.zeros(5, 3))], [1.0]),
    ],
)
def test_stack_refuses_what_does_not_fit(pairs: list[FactorPair], scales: list[float]) -> None:
    with pytest.raises(ConfigError, match="stack got"):
        stack(pairs, scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_padding_changes_the_shape_and_nothing_else(dtype: torch.dtype) -> None:
    pair = random_pair(3, dtype=dtype)
    padded = pad(pair, 8)
    assert padded.A.shape == (8, 7)
    assert padded.B.shape == (5, 8)
    assert padded.A.dtype == padded.B.dtype == dtype
    assert torch.equal(padded.A[:3], pair.A)
    assert torch.equal(padded.B[:, :3], pair.B)
    assert not padded.A[3:].any()
    assert not padded.B[:, 3:].any()


def test_padding_cannot_cut() -> None:
    with pytest.raises(ConfigError, match="pad to rank 2, but the pair has rank 3: give at least 3"):
        pad(random_pair(3), 2)
