"""Fresh tensors: what the initialisations of a `TensorSpec` draw."""

import pytest
import torch
from torch import Tensor

from ziggurat.host.tensors import draw
from ziggurat.kit import Init, TensorSpec, Weight, gaussian, kaiming

NO_WEIGHT = Weight("a", lambda: torch.zeros(()))


def fresh(init: Init, *shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(TensorSpec(shape, init), NO_WEIGHT, torch.device(device), dtype)


def test_kaiming_fills_the_bounds_of_lora() -> None:
    A = fresh(kaiming, 64, 400)
    assert A.abs().max() <= 0.05
    assert A.abs().max() > 0.0499
    # A uniform distribution on [-b, b] has standard deviation b / sqrt(3); 25,600 samples give it to 1%.
    torch.testing.assert_close(A.std().item(), 0.05 / 3**0.5, rtol=0.02, atol=0)


def test_gaussian_has_standard_deviation_one_over_rank() -> None:
    A = fresh(gaussian, 8, 4000)
    torch.testing.assert_close(A.std().item(), 1 / 8, rtol=0.03, atol=0)
    assert abs(A.mean()) < 0.005


@pytest.mark.parametrize("init", [kaiming, gaussian])
def test_initialising_works_without_memory_and_in_half_precision(init: Init) -> None:
    assert fresh(init, 4, 8, device="meta").device.type == "meta"
    assert fresh(init, 4, 8, dtype=torch.bfloat16).ne(0).any()


@pytest.mark.parametrize("init", [kaiming, gaussian])
def test_initialising_follows_the_seed(init: Init) -> None:
    torch.manual_seed(3)
    first = fresh(init, 4, 8)
    torch.manual_seed(3)
    assert torch.equal(first, fresh(init, 4, 8))
