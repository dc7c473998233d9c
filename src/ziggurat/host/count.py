"""The number of trainable parameters of an adapter, from its method's `tensors` alone: nothing is built."""

import copy
from typing import Any

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.base.targets import DEFAULT_TARGETS, checked_specs, sites_of
from ziggurat.host.method import PAIRS_OF_PEFT, Method, kind_of, method_of, specs_of, trainable
from ziggurat.host.saved.sites_table import from_table


def count(model: nn.Module, config: Any) -> int:
    """Trainable parameters of the adapter of `config` in `model`, without heads and biases; shared ones count once.

    Raises:
        ConfigError: the config is none of a registered method, or doesn't fit the model.
    """
    method = method_of(config)
    if method is None:
        raise ConfigError(
            f"{type(config).__name__} is no config of a registered method: it has to be built to be counted."
        )
    config = with_targets(config, model, method)
    sites = sites_of(method, config, model)
    if not sites:
        raise ConfigError(
            f"target_modules={config.target_modules!r} matches no linear layer of {type(model).__name__}."
        )
    return trainable(checked_specs(method, config, sites))


def why_larger(config: Any) -> str:
    """The reason why the adapter of a config, once it is in a model, has more parameters than LoRA, in words."""
    method = method_of(config)
    if method is None:
        shares = kind_of(config) not in PAIRS_OF_PEFT
    else:
        sites = from_table(config.sites or {}).values()
        shares = any(spec.shared for site in sites for spec in specs_of(method, config.at(site), site).values())
    return "in this model too few layers share" if shares else "the method shares nothing between layers"


def with_targets(config: Any, model: nn.Module, method: Method | None = None) -> Any:
    """A copy of the config with the architecture's default target modules, where it names none."""
    config = copy.copy(config)
    if config.target_modules is None and getattr(config, "target_parameters", None):
        config.target_modules = set()
    if config.target_modules is None and (method is None or method.sites is None):
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULT_TARGETS:
            raise ConfigError(f"no default targets for a model of type {kind!r}: give target_modules.")
        named = DEFAULT_TARGETS[kind]
        config.target_modules = named if isinstance(named, str) else set(named)
    return config
