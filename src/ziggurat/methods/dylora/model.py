"""DyLoRA (arXiv 2210.07558): what is stored, and what is computed.

dW = (lora_alpha / b) B[:, :b] A[:b] with b drawn anew, from min_rank to r, for each forward pass in training.
"""

import torch

from ziggurat.host.method import EVALUATION, Card, Context, Method, Part, Stored
from ziggurat.host.registry import register
from ziggurat.host.site import Site
from ziggurat.host.tensors import TensorSpec, low_rank
from ziggurat.host.tuner import MethodTuner
from ziggurat.host.values import check_room
from ziggurat.lowrank.pair import FactorPair
from ziggurat.methods.dylora.config import CITATION, DyLoRAConfig


def tensors(config: DyLoRAConfig, site: Site) -> dict[str, TensorSpec]:
    """A (r, d_in) and B (d_out, r), for this site alone."""
    return low_rank(config.r, site.d_in, site.d_out, config.init_weights)


def pair(config: DyLoRAConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """The leading b directions; with `frozen` only the last of them gives a gradient."""
    b = (context.drawn or config.r) if context.training else config.kept_rank
    A, B = t["A"][:b], t["B"][:, :b]
    if context.training and config.frozen:
        A = torch.cat([A[:-1].detach(), A[-1:]])
        B = torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1)
    return FactorPair(A, config.scale_of(b) * B)


def draw(config: DyLoRAConfig) -> int:
    """b, uniform from min_rank to r."""
    return int(torch.randint(config.min_rank, config.r + 1, ()))


def check(config: DyLoRAConfig, site: Site) -> None:
    """Raise ConfigError if the largest rank has no room in the matrix of `site`."""
    check_room(config, f"r={config.r}", config.r, site)


def parts(config: DyLoRAConfig, site: Site, t: Stored) -> list[Part]:
    """The directions that act outside training; the rest takes no part."""
    return [Part("dylora", pair(config, site, t, EVALUATION))]


class DyLoRAModel(MethodTuner):
    """Puts DyLoRA adapters into a model. Made by PEFT from a `DyLoRAConfig`; see there."""


METHOD = Method(
    "dylora",
    DyLoRAConfig,
    tensors,
    pair,
    Card("DyLoRA", "2210.07558", "LoRA whose every leading rank works", CITATION),
    check=check,
    parts=parts,
    draw=draw,
    older_names=((r"\.dylora_([AB])((?:\.[^.]+)?)$", r".dylora_factors\2.\1"),),
)
register(METHOD, tuner=DyLoRAModel)
