"""LoRA² (arXiv 2408.06854): tensors and equation.

dW = scale (u v) diag(E) (V U): U goes down to the outer rank k, V to the inner rank r, E weighs each of the r
directions, v and u go back. scale = lora_alpha / r.
"""

from torch import Tensor, nn

from ziggurat.host.method import Context, Part, Stored
from ziggurat.host.site import Site
from ziggurat.host.tensors import TensorSpec, Weight, normal, ones, zeros
from ziggurat.lowrank.pair import FactorPair
from ziggurat.methods.lora2.config import LoRA2Config

#: Standard deviation of the factors at the start.
INIT_STD = 0.02


def tensors(config: LoRA2Config, site: Site) -> dict[str, TensorSpec]:
    """U (k, d_in), V (r, k), E (r), v (k, r), u (d_out, k). At the start E = 0 and the others are N(0, 0.02^2); with
    init_weights="orthonormal" u = 0, E = 1 and U, V, v are orthonormal along their smaller side."""
    r, k = config.rank_at(site.path), config.outer_rank_at(site.d_in, site.d_out)
    k = k if r else 0  # no direction of the inner plane, no use for the outer one
    shapes = {"U": (k, site.d_in), "V": (r, k), "E": (r,), "v": (k, r), "u": (site.d_out, k)}
    factor = {False: _random, "orthonormal": _orthonormal}.get(config.init_weights, normal(INIT_STD))
    inits = dict.fromkeys(shapes, factor)
    if config.init_weights == "orthonormal":
        inits |= {"u": zeros, "E": ones}
    else:
        inits["E"] = _above_zero if config.init_weights is False else zeros
    return {key: TensorSpec(shape, inits[key], up=key == "u") for key, shape in shapes.items()}


def pair(config: LoRA2Config, site: Site, t: Stored, context: Context) -> FactorPair:
    """A = U (k, d_in), B = u (v diag(scale E) V) (d_out, k): the inner plane is folded into B, k x k."""
    return FactorPair(t["U"], t["u"] @ ((t["v"] * (t["E"] * config.scale)) @ t["V"]))


def parts(config: LoRA2Config, site: Site, t: Stored) -> list[Part]:
    """The outer plane u U, and the inner plane scale v diag(E) V (k x k)."""
    if not t["E"].numel():
        return []
    return [
        Part("outer", FactorPair(t["U"], t["u"]), ("U", "u"), adds=False),
        Part("inner", FactorPair(t["V"], t["v"] * (t["E"] * config.scale)), ("V", "E", "v"), adds=False),
    ]


def _orthonormal(tensor: Tensor, weight: Weight) -> None:
    """G = I for the Gram matrix of the smaller side, where the regulariser is 0."""
    nn.init.orthogonal_(tensor)


def _random(tensor: Tensor, weight: Weight) -> None:
    tensor.normal_(0.0, max(tensor.shape[-1], 1) ** -0.5)


def _above_zero(tensor: Tensor, weight: Weight) -> None:
    tensor.uniform_(0.5, 1.0)
