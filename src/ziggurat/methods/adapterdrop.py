"""Bottleneck adapters after linear layers (arXiv 1902.00751), with AdapterDrop (arXiv 2010.11918): a baseline of the
papers' tables.

y = W x + U f(D dropout(W x) + a) + c. It is not a factor pair, since f is not linear, and so adds its own update.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ziggurat.errors import ConfigError, ExportError
from ziggurat.host.config import MethodConfig
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method import EVALUATION, Card, Context, Method
from ziggurat.host.method_layer import rows_by_adapter
from ziggurat.host.registry import register
from ziggurat.host.site import Site, check_room
from ziggurat.host.tensors import TensorSpec, kaiming, zeros
from ziggurat.host.tuner import MethodTuner
from ziggurat.host.values import check_rank, one_of, option, whole
from ziggurat.lowrank.pair import FactorPair

CITATION = """@article{ruckle2021adapterdrop,
  title     = {{AdapterDrop}: On the Efficiency of Adapters in Transformers},
  author    = {R{\\"u}ckl{\\'e}, Andreas and Geigle, Gregor and Glockner, Max and Beck, Tilman and Pfeiffer, Jonas and
               Reimers, Nils and Gurevych, Iryna},
  journal   = {arXiv preprint arXiv:2010.11918},
  year      = {2020}
}"""

#: The linear that ends the feed-forward part of a layer, in the names of the usual architectures.
FEED_FORWARD_OUTPUT = (
    r"(.*\.)?\d+\.("
    r"output\.dense|ffn\.lin2|mlp\.(down_proj|c_proj|fc2|dense_4h_to_h|output)|fc2|linear2|"
    r"layer\.\d+\.DenseReluDense\.wo|feed_forward\.(w2|output_dense))"
)
_CANNOT = (
    "a bottleneck adapter isn't linear, so no weight and no plain LoRA can hold it: keep the adapter beside its model."
)


@dataclass(repr=False, eq=False)
class AdapterDropConfig(MethodConfig):
    """Config of bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2021) with AdapterDrop (arXiv 2010.11918).

    After a linear layer W: y = W x + U f(D dropout(W x) + a) + c with D (r, d_out), U (d_out, r), the activation f and
    U = 0 at the start. Default place: the end of each layer's feed-forward part, one adapter a layer (Pfeiffer); with
    the attention's output in target_modules too it is Houlsby's. An update of this kind can't be merged into W.

    Args:
        r: width of the bottleneck.
        activation: f.
        drop_layers: specialised AdapterDrop: layers 0 .. drop_layers - 1 get no adapter.
        robust_drop: robust AdapterDrop: each forward in training leaves out the adapters of the first n layers, n drawn
            uniform in 0..robust_drop. Afterwards `model.drop(n)` leaves out those of the first n layers for speed.
        bias: "none", "all", or "adapterdrop_only" (the biases of the adapted linear layers).

    Raises:
        ConfigError: values that can't work in any model; fields that only low-rank updates have.
    """

    r: int = option(16, "Width of the bottleneck.", check_rank)
    activation: Literal["relu", "gelu", "silu"] = option("relu", "Between down and up.", one_of("relu", "gelu", "silu"))
    drop_layers: int = option(0, "So many of the lowest layers get no adapter.", whole(0))
    robust_drop: int = option(0, "Up to so many lowest layers are left out while training.", whole(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is None:
            self.target_modules = FEED_FORWARD_OUTPUT
        if self.drop_layers and self.robust_drop:
            raise ConfigError("drop_layers and robust_drop are the two variants of AdapterDrop: give one of them.")
        if self.use_rslora or self.lora_alpha != 16:
            raise ConfigError("lora_alpha and use_rslora have no meaning here: a bottleneck isn't scaled by its width.")


def tensors(config: AdapterDropConfig, site: Site) -> dict[str, TensorSpec]:
    """D (r, d_out), U (d_out, r), a (r), c (d_out); U = 0 unless `init_weights` is False. Nothing in dropped layers."""
    if site.layer < config.drop_layers:
        return {}
    return {
        "down": TensorSpec((config.r, site.d_out), kaiming),
        "up": TensorSpec((site.d_out, config.r), kaiming if config.init_weights is False else zeros),
        "down_bias": TensorSpec((config.r,), zeros),
        "up_bias": TensorSpec((site.d_out,), zeros),
    }


def draw(config: AdapterDropConfig) -> int:
    """The number of lowest layers that a robust adapter leaves out in this pass, uniform from 0 to `robust_drop`."""
    return int(torch.randint(0, config.robust_drop + 1, ())) if config.robust_drop else 0


class BottleneckLinear(AdaptedLinear):
    """`dropped`: adapters of layers below this number are skipped permanently; `robust_drop` draws a number for each
    pass."""

    other_param_names = (*AdaptedLinear.other_param_names, "dropped")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropped: dict[str, int] = {}

    def _add(self, y: Tensor, x: Tensor, adapter: str, reuse_y: bool) -> Tensor:
        """y + U f(D dropout(y) + a) + c, or y where the layer is left out: it reads what W has made of x."""
        drawn = self.context(adapter).drawn or 0
        if self.sites[adapter].layer < max(drawn, self.dropped.get(adapter, 0)):
            return y
        t, config = self.stored(adapter), self.configs[adapter]
        h = functional.dropout(y.to(t["down"].dtype), config.lora_dropout, self.training)
        h = getattr(functional, config.activation)(functional.linear(h, t["down"], t["down_bias"]))
        return y + functional.linear(h, t["up"], t["up_bias"]).to(y.dtype)

    def _add_by_sample(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        y = y.clone()
        for adapter, rows in rows_by_adapter(adapter_names, len(x), self.adapters, y.device):
            y[rows] = self._add(y[rows], x, adapter, reuse_y=False)
        return y

    def pair_of(self, adapter: str, tensors: dict[str, Tensor], context: Context = EVALUATION) -> FactorPair:
        raise ExportError(f"adapter {adapter!r}: {_CANNOT}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_CANNOT)


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
