"""LoRA-XS (arXiv 2405.17604): only an r x r matrix trains, between frozen factors from the weight's own SVD.

W = U S V^T;  dW = scale B R A with B = U_r, A = S_r V_r^T, the r largest singular values and vectors, both frozen;
scale = lora_alpha / r.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ziggurat.errors import ConfigError
from ziggurat.kit import (
    Card,
    Context,
    FactorPair,
    Init,
    Method,
    MethodConfig,
    Site,
    Stored,
    TensorSpec,
    Weight,
    kaiming,
    normal,
    option,
    register,
    zeros,
)

CITATION = """@article{balazy2024loraxs,
  title   = {{LoRA-XS}: Low-Rank Adaptation with Extremely Small Number of Parameters},
  author  = {Ba{\\l}azy, Klaudia and Banaei, Mohammadreza and Aberer, Karl and Tabor, Jacek},
  journal = {arXiv preprint arXiv:2405.17604},
  year    = {2024}
}"""

#: Standard deviation of R at the start.
INIT_STD = 1e-5


@dataclass(repr=False, eq=False)
class LoRAXSConfig(MethodConfig):
    """Config of LoRA-XS (arXiv 2405.17604): r^2 trainable parameters for each linear layer.

    A and B are stored with the adapter, because a singular value decomposition isn't bitwise reproducible on another
    machine: its file holds r (d_in + d_out + r) values for each linear layer, a little more than LoRA's.

    Args:
        init_weights: "gaussian": R is normal with standard deviation 1e-5, as in the paper. True: R = 0, so that a
            fresh adapter changes nothing at all. False: R is large, for tests.
    """

    init_weights: bool | Literal["gaussian"] = option(
        "gaussian", "'gaussian': R normal with standard deviation 1e-5. True: R zero. False: large, for tests."
    )


def tensors(config: LoRAXSConfig, site: Site) -> dict[str, TensorSpec]:
    """A (r, d_in) and B (d_out, r), frozen, and R (r, r)."""
    r, init = config.r, {True: zeros, False: kaiming, "gaussian": normal(INIT_STD)}[config.init_weights]
    return {
        "A": TensorSpec((r, site.d_in), _right(r), trainable=False),
        "B": TensorSpec((site.d_out, r), _left(r), trainable=False),
        "R": TensorSpec((r, r), init),
    }


def pair(config: LoRAXSConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """A, scale B R."""
    return FactorPair(t["A"], t["B"] @ (config.scale_of(config.r) * t["R"]))


def check(config: LoRAXSConfig, site: Site) -> None:
    """Raise ConfigError if the weight of `site` has fewer singular values than the rank."""
    most = min(site.d_in, site.d_out)
    if config.r > most:
        raise ConfigError(
            f"r={config.r}: the weight of {site.path!r} has {most} singular values. Lower r, or leave the module out "
            "by exclude_modules."
        )


def _right(r: int) -> Init:
    def init(A: Tensor, weight: Weight) -> None:
        _, S, Vh = weight.svd(r)
        A.copy_(S.unsqueeze(1) * Vh)

    return init


def _left(r: int) -> Init:
    def init(B: Tensor, weight: Weight) -> None:
        B.copy_(weight.svd(r)[0])

    return init


METHOD = Method(
    "loraxs",
    LoRAXSConfig,
    tensors,
    pair,
    Card("LoRA-XS", "2405.17604", "an r x r matrix between frozen factors from the weight's own SVD", CITATION),
    check=check,
)
register(METHOD)
