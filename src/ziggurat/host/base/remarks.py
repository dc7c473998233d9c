"""Checks of an adapter's target modules before training: modules that can't be adapted, experts that stay frozen."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.site import Site
from ziggurat.host.tensors import ByAdapter

logger = logging.getLogger(__name__)

#: Mixers whose fused kernel multiplies by these weights itself, bypassing an adapter; PEFT's list for LoRA.
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
PAST_THE_ADAPTER = ("out_proj", "conv1d")
#: Names of the projections of experts that are linear layers, and in checkpoints.
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate_up_proj", "input_linear", "output_linear")


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


def remark(model: nn.Module, config: Any, all_linear: bool, sites: Mapping[str, Site]) -> None:
    """Log which experts stay frozen although the targets seem to include them: "all-linear", or projections of experts.

    Experts of transformers' mixtures are one parameter of three dimensions, no linear layers.
    """
    names = config.target_modules if isinstance(config.target_modules, set | list) else ()
    halves = sorted(name for name in names if name.rpartition(".")[2] in OF_EXPERTS)
    if not (all_linear or halves or config.target_parameters):
        return
    of_adapters = {id(p) for module in model.modules() if isinstance(module, ByAdapter) for p in module.parameters()}
    base = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if id(p) not in of_adapters}
    experts = {path: p.numel() for path, p in base.items() if p.dim() == 3 and "expert" in path and path not in sites}
    if experts:
        named = "'all-linear'" if all_linear else halves
        given = f"target_modules={named}" if named else f"target_parameters={sorted(config.target_parameters)}"
        ends = dict.fromkeys(".".join(path.split(".")[-2:]) for path in experts)
        logger.warning(
            "%s leaves %d parameters frozen that hold the experts of this model and are no linear layers (%s, ...): "
            "%.0f%% of the model's parameters. target_parameters=%s adapts them.",
            *(given, len(experts), next(iter(experts))),
            *(100 * sum(experts.values()) / sum(p.numel() for p in base.values()), list(ends)),
        )
