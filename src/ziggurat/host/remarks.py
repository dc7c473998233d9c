"""What a user must know of an adapter's places before training: what can't work there, and what stays frozen."""

import logging
from collections.abc import Mapping

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.site import Site

logger = logging.getLogger(__name__)

#: Mixers whose fused kernel multiplies by these weights itself, past whatever stands beside them; PEFT's list for LoRA.
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
PAST_THE_ADAPTER = ("out_proj", "conv1d")


def check_fused_mixers(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Raise ConfigError for a module whose weight a fused kernel reads past its adapter."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MAMBA:
        return
    for path in sites:
        if path.rpartition(".")[2] in PAST_THE_ADAPTER:
            raise ConfigError(
                f"{path!r} of a {kind} model: its mixer's fused kernel multiplies by this weight itself, so an adapter "
                f"beside it takes no part. Leave {' and '.join(PAST_THE_ADAPTER)} out of target_modules."
            )


def remark(model: nn.Module, all_linear: bool) -> None:
    """Log what stays frozen though "all-linear" sounds like all.

    Experts of transformers' mixtures are one parameter of three dimensions, no linear layers.
    """
    if all_linear:
        experts = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name}
        if experts:
            share = sum(experts.values()) / sum(p.numel() for p in model.parameters())
            logger.warning(
                "target_modules='all-linear' adapts linear layers, and %d experts' parameters of this model are none "
                "(%s, ...): they stay frozen, %.0f%% of the model's parameters.",
                *(len(experts), next(iter(experts)), 100 * share),
            )
