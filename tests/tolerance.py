"""How far two computations of the same numbers may lie apart: it follows from the dtype, the sums and the depth.

Two processors, two numbers of threads or two formulas add the same products in different orders, and each order
rounds differently. With unit roundoff u, a sum of n terms is wrong by at most LAMBDA sqrt(n) u of the terms' size,
unless with a probability that falls as exp(-LAMBDA^2 / 2) [Higham & Mary 2019, doi 10.1137/18M1226312, theorem 2.4];
independent errors of m sums in series add up as sqrt(m). So

    tolerance = LAMBDA u sqrt(n m),        u = eps / 2

of the largest number there is: a small number may be the difference of large ones, and has their error. So the
tolerance is an absolute one, the same for all entries of a tensor.
"""

import torch
from torch import Tensor

from plain_models import LAYERS, WIDTH

#: Standard deviations, counted as if every rounding were the worst one; a rounding that is uniform has u / sqrt(3).
LAMBDA = 4.0
#: Sums in series in a transformer layer: two norms, q k, scores, softmax, values, output, up, down.
SUMS_IN_A_LAYER = 9
#: How many tolerances lie at least between a model with its adapter and without, for a comparison to say anything.
FAR = 4.0


def rounding(length: int, depth: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """The tolerance relative to the largest number. `length`: n, terms of the longest sum; `depth`: m, sums in series.

    Products of a 16-bit dtype are added in float32, and a sum is rounded once: n counts as 1.
    """
    assert length > 0 and depth > 0 and dtype.is_floating_point
    return LAMBDA * torch.finfo(dtype).eps / 2 * ((1 if dtype.itemsize == 2 else length) * depth) ** 0.5


def assert_sums_agree(
    actual: Tensor,
    expected: Tensor,
    length: int,
    depth: int = 1,
    *,
    dtype: torch.dtype | None = None,
    size: float = 0.0,
    name: str = "",
) -> None:
    """`found` is `expected` but for the order of sums.

    `dtype`: the coarsest that either computation uses, if it isn't that of `expected`; `size`: the largest number that
    they add, if `expected` holds only their difference.
    """
    _assert_close(actual, expected, _size(expected, size) * rounding(length, depth, dtype or expected.dtype), name)


def model_rounding(layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> float:
    """`rounding` of what a tiny model of `zoo` computes: an output, or a gradient, which goes through all layers twice.

    Its longest sum runs over the inner width of the MLP, 2 WIDTH.
    """
    return rounding(2 * WIDTH, 2 * layers * SUMS_IN_A_LAYER, dtype)


def assert_models_agree(
    actual: Tensor,
    expected: Tensor,
    layers: int = LAYERS,
    *,
    dtype: torch.dtype | None = None,
    size: float = 0.0,
    without: Tensor | None = None,
    name: str = "",
) -> None:
    """Two models of `zoo` compute `found` and `expected`, by the same formulas; see `model_rounding`.

    `without`: what the model gives without its adapter. It has to lie FAR away: in 16 bits the tolerance is a tenth of
    the output, and a small adapter that is left out would pass.
    """
    atol = _size(expected, size) * model_rounding(layers, dtype or expected.dtype)
    _assert_close(actual, expected, atol, name)
    if without is not None:
        assert float((without - expected.detach()).abs().max()) > FAR * atol, f"{name}: the adapter hardly shows"


def _size(expected: Tensor, size: float) -> float:
    return max(size, float(expected.detach().abs().max()) if expected.numel() else 0.0)


def _assert_close(actual: Tensor, expected: Tensor, atol: float, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol, msg=lambda text: f"{name}: {text}".lstrip(": "))
