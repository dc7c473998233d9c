"""The config of bottleneck adapters."""

from dataclasses import dataclass
from typing import Literal

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.values import check_rank, one_of, option, whole

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


@dataclass
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
