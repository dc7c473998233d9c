"""DyLoRA (arXiv 2210.07558): one LoRA adapter that can be cut to any of its leading ranks.

dW = (lora_alpha / b) B[:, :b] A[:b] with b drawn anew, from min_rank to r, for each forward pass in training.
"""

from dataclasses import dataclass

import torch

from ziggurat.errors import ConfigError
from ziggurat.host.tuner import MethodTuner
from ziggurat.kit import (
    Card,
    Context,
    FactorPair,
    Method,
    MethodConfig,
    Site,
    Stored,
    TensorSpec,
    check_flag,
    is_whole,
    low_rank,
    option,
    register,
    shown,
)

CITATION = """@article{valipour2023dylora,
  title     = {{DyLoRA}: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
               Adaptation},
  author    = {Valipour, Mojtaba and Rezagholizadeh, Mehdi and Kobyzev, Ivan and Ghodsi, Ali},
  journal   = {arXiv preprint arXiv:2210.07558},
  year      = {2022}
}"""


@dataclass(repr=False, eq=False)
class DyLoRAConfig(MethodConfig):
    """Config of DyLoRA (arXiv 2210.07558): one LoRA adapter that can be cut to any of its leading ranks.

    In training every forward draws a rank b, uniform in `min_rank`..r, the same for all linear layers, and uses the
    first b directions: h = W x + (lora_alpha / b) B[:, :b] A[:b] dropout(x). Otherwise b = `inference_rank`.

    Args:
        r: the largest rank.
        min_rank: the smallest rank that is drawn.
        frozen: only direction b learns at a step; the directions before it are used but frozen (the paper's "Frozen"
            variant). Default: the first b all learn.
        inference_rank: the rank used outside training, in merging and in export. None: r.
        bias: "none", "all", or "dylora_only" (the biases of the adapted linear layers).

    Raises:
        ConfigError: ranks that don't satisfy 1 <= min_rank, inference_rank <= r.
    """

    min_rank: int = option(1, "The smallest rank drawn in training.")
    frozen: bool = option(False, "Only the last of the drawn directions learns at a step.", check_flag)
    inference_rank: int | None = option(None, "Rank used outside training (default: r).")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_rank", "inference_rank"):
            value = getattr(self, name)
            if not is_whole(value, 1, self.r) and not (value is None and name == "inference_rank"):
                raise ConfigError(f"{name}={shown(value)}: a whole number from 1 to r={self.r} is needed.")

    @property
    def kept_rank(self) -> int:
        """The rank used outside training."""
        return self.r if self.inference_rank is None else self.inference_rank


def tensors(config: DyLoRAConfig, site: Site) -> dict[str, TensorSpec]:
    """A (r, d_in) and B (d_out, r), for this site alone."""
    return low_rank(config.r, site.d_in, site.d_out, config.init_weights)


def pair(config: DyLoRAConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """The leading b directions; with `frozen` only the last of them has a gradient."""
    b = (context.drawn or config.r) if context.training else config.kept_rank
    A, B = t["A"][:b], t["B"][:, :b]
    if context.training and config.frozen:
        A = torch.cat([A[:-1].detach(), A[-1:]])
        B = torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1)
    return FactorPair(A, config.scale_of(b) * B)


def draw(config: DyLoRAConfig) -> int:
    """b, uniform from min_rank to r."""
    return int(torch.randint(config.min_rank, config.r + 1, ()))


class DyLoRAModel(MethodTuner):
    """Puts DyLoRA adapters into a model. Made by PEFT from a `DyLoRAConfig`; see there."""


METHOD = Method(
    "dylora",
    DyLoRAConfig,
    tensors,
    pair,
    Card("DyLoRA", "2210.07558", "LoRA whose every leading rank works", CITATION),
    draw=draw,
    older_names=((r"\.dylora_([AB])((?:\.[^.]+)?)$", r".dylora_factors\2.\1"),),
)
register(METHOD, tuner=DyLoRAModel)
