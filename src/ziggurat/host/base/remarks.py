"""Checks of an adapter's target modules before training: modules that can't be adapted, experts that stay frozen."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.bank import Stores
from ziggurat.host.base.targets import DEFAULT_TARGETS, called
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
                f"beside it takes no part. Leave it out: exclude_modules={list(PAST_THE_ADAPTER)}."
            )


def remark_inner(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Warn where another library's adapter lies inside the new one: PEFT would save it by names that nothing loads."""
    modules = [(path, model.get_submodule(path)) for path, site in sites.items() if not site.fused]
    inner = [path for path, layer in modules if isinstance(layer, BaseTunerLayer) and not isinstance(layer, Stores)]
    if inner:
        kind = type(model.get_submodule(inner[0])).__name__
        logger.warning(
            "%d of the linear layers (%s, ...) have an adapter already (%s), which now lies inside the new one. PEFT "
            "saves the inner adapter by names with '.base_layer.', and other models load such a file without effect: "
            "save it before you add another method's, or merge it first.",
            *(len(inner), inner[0], kind),
        )


def _remark_idle(model: nn.Module, names: Collection[str]) -> None:
    """Warn of target names that match no module. The defaults of a type of models name those of its versions."""
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    idle = sorted({*names} - called(model, names) - {*OF_EXPERTS})
    if idle and {*names} != {*DEFAULT_TARGETS.get(kind, ())}:
        shown = ", ".join(idle[:3]) + ", ..." * (len(idle) > 3)
        logger.warning("target_modules names %s, and no module of this model is called so", shown)


def remark(model: nn.Module, config: Any, all_linear: bool, sites: Mapping[str, Site]) -> None:
    """Log which experts stay frozen although the targets seem to include them: "all-linear", or projections of experts.

    Experts of transformers' mixtures are one parameter of three dimensions, no linear layers.
    """
    names = config.target_modules if isinstance(config.target_modules, set | list) else ()
    if not all_linear and config.ziggurat_version is None:  # its user was warned when it was made
        _remark_idle(model, names)
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
