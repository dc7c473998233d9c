"""Bottleneck adapters as a PEFT method: after linear layers, optionally dropped in the lowest layers."""

from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.host.method import Card, Method
from ziggurat.host.registry import register
from ziggurat.host.site import Site, check_room
from ziggurat.host.tuner import MethodTuner
from ziggurat.methods.adapterdrop.config import CITATION, AdapterDropConfig
from ziggurat.methods.adapterdrop.layer import BottleneckLinear, draw, tensors


class AdapterDropModel(MethodTuner):
    """Puts bottleneck adapters into a model. Made by PEFT from an `AdapterDropConfig`; see there."""

    def drop(self, layers: int, adapter: str = "default") -> None:
        """Leave out the bottlenecks of `adapter` in the first `layers` layers, for speed; 0 brings them back.

        Raises:
            ConfigError: a negative number, or one that leaves no layer an adapter.
        """
        linear_layers: list[Any] = [layer for _, layer in self._linear_layers() if adapter in layer.sites]
        deepest = max((linear.sites[adapter].layer for linear in linear_layers), default=-1)
        if not 0 <= layers <= deepest:
            raise ConfigError(
                f"drop({layers}): from 0 to {deepest} layers can be left out, the last with an adapter is {deepest}."
            )
        for linear in linear_layers:
            linear.dropped[adapter] = layers


def check(config: AdapterDropConfig, site: Site) -> None:
    """Raise ConfigError if the rank has no use at `site`, or dropping leaves no layer an adapter."""
    check_room(config, f"r={config.r}", config.r, site, free=True)
    for name in ("drop_layers", "robust_drop"):
        if (drops := getattr(config, name)) and not site.role:
            raise ConfigError(
                f"{name}={drops}, but {site.path!r} is in no stack of layers, so it has no layer number. Leave it out "
                "with target_modules or exclude_modules, or set layers_pattern."
            )
        if drops and drops >= site.num_layers:
            raise ConfigError(
                f"{name}={drops} leaves none of the {site.num_layers} layers around {site.path!r} an adapter; at most "
                f"{site.num_layers - 1}."
            )


METHOD = Method(
    "adapterdrop",
    AdapterDropConfig,
    tensors,
    None,
    Card(
        "bottlenecks",
        "2010.11918",
        "bottlenecks after the layers' feed-forward part, with AdapterDrop by its fields",
        CITATION,
        merges=False,
    ),
    check=check,
    draw=draw,
    older_names=((r"\.adapterdrop_((?:up|down)(?:_bias)?)((?:\.[^.]+)?)$", r".adapterdrop_factors\2.\1"),),
)
register(METHOD, tuner=AdapterDropModel, layer=BottleneckLinear)
