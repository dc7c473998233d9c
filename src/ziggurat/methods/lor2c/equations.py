"""LoR2C (arXiv 2503.00572): tensors and equation.

h_out = Layer(h_in) + s B A h_in around a layer, or a span of layers, with A (r, d), B (d, r) and s = lora_alpha / r.
With `share` all paths of a stack have one A. A layer whose path was replaced has plain LoRA on its query and value.
"""

from dataclasses import replace

from ziggurat.host.method import EVALUATION, Context, Part, Stored
from ziggurat.host.site import Site, leaf_name
from ziggurat.host.tensors import TensorSpec, low_rank
from ziggurat.lowrank.pair import FactorPair, stack
from ziggurat.methods.lor2c.config import LoR2CConfig


def tensors(config: LoR2CConfig, site: Site) -> dict[str, TensorSpec]:
    """A and B of a path, or of the LoRA that may replace it."""
    if site.span is None:
        return low_rank(config.lora_r, site.d_in, site.d_out, config.init_weights)
    specs = low_rank(config.r, site.d_in, site.d_out, config.init_weights)
    if config.share:
        specs["A"] = replace(specs["A"], shared=f"{leaf_name(site.stack)}:{site.d_in}")
    return specs


def pair(config: LoR2CConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """A and s B."""
    return stack([FactorPair(t["A"], t["B"])], [config.lora_scale if site.span is None else config.scale])


def parts(config: LoR2CConfig, site: Site, t: Stored) -> list[Part]:
    """A path, or the LoRA in its place."""
    return [Part("injected" if site.span is None else "path", pair(config, site, t, EVALUATION))]
