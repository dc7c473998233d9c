"""Tied-LoRA (arXiv 2311.09578): one A and one B for all layers, scaled by private vectors of each layer.

dW_n = scale diag(v_n) B diag(u_n) A with u_n (r) and v_n (d_out);  scale = lora_alpha / r.
"""

from dataclasses import dataclass
from typing import Any

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
    gaussian,
    kaiming,
    ones,
    option,
    register,
    shown,
    zeros,
)

CITATION = """@article{renduchintala2023tiedlora,
  title   = {{Tied-LoRA}: Enhancing parameter efficiency of {LoRA} with Weight Tying},
  author  = {Renduchintala, Adithya and Konuk, Tugrul and Kuchaiev, Oleksii},
  journal = {arXiv preprint arXiv:2311.09578},
  year    = {2023}
}"""


def _check_letters(name: str, value: Any) -> None:
    letters = value if isinstance(value, str) else ""
    if not letters or len(set(letters)) < len(letters) or not set(letters) <= set("ABuv"):
        raise ConfigError(f"{name}={shown(value)}: some of the letters A, B, u, v, each once, as 'ABuv'.")


@dataclass(repr=False, eq=False)
class TiedLoRAConfig(MethodConfig):
    """Config of Tied-LoRA (arXiv 2311.09578).

    Layers are tied by role and shape: the queries of all layers have one A and B, the values another. The paper adapts
    one fused linear layer for queries, keys and values, and so ties these, too.

    Args:
        trained: the tensors that train, letters of "ABuv" in one word; the paper compares such choices. The first of B,
            v, u, A that trains starts at 0, so that a fresh adapter changes nothing; otherwise u and v start at 1, A
            and B at random.

    Raises:
        ConfigError: `trained` is no such word.
    """

    trained: str = option("ABuv", "The tensors that train, some of A, B, u, v: 'ABuv'.", _check_letters)


def tensors(config: TiedLoRAConfig, site: Site) -> dict[str, TensorSpec]:
    """A (r, d_in) and B (d_out, r), shared by the sites of one role and shape; u (r) and v (d_out) for this site."""
    zero = next(key for key in "BvuA" if key in config.trained)
    matrix, vector = (gaussian if config.init_weights == "gaussian" else kaiming), ones
    if config.init_weights is False:
        zero, vector = "", _around_one

    def spec(key: str, shape: tuple[int, ...], init: Init, shared: str = "") -> TensorSpec:
        return TensorSpec(shape, zeros if key == zero else init, shared, key in config.trained, up=key in "Bv")

    return {
        "A": spec("A", (config.r, site.d_in), matrix, site.kind),
        "B": spec("B", (site.d_out, config.r), kaiming, site.kind),
        "u": spec("u", (config.r,), vector),
        "v": spec("v", (site.d_out,), vector),
    }


def pair(config: TiedLoRAConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """diag(u) A, scale diag(v) B."""
    return FactorPair(t["u"].unsqueeze(1) * t["A"], (config.scale_of(config.r) * t["v"]).unsqueeze(1) * t["B"])


def _around_one(tensor: Tensor, weight: Weight) -> None:
    tensor.uniform_(0.5, 1.5)


METHOD = Method(
    "tiedlora",
    TiedLoRAConfig,
    tensors,
    pair,
    Card("Tied-LoRA", "2311.09578", "one A and B for all layers, scaled by vectors of each layer's own", CITATION),
)
register(METHOD)
