"""ShareLoRA (arXiv 2406.10785): LoRA whose A, or B, or both are shared by all layers.

dW_n = scale B_n A with share="A",  scale B A_n with "B",  scale B A with "AB";  scale = lora_alpha / r.
"""

from dataclasses import dataclass, replace
from typing import Literal

from ziggurat.kit import (
    Card,
    Context,
    FactorPair,
    Method,
    MethodConfig,
    Site,
    Stored,
    TensorSpec,
    low_rank,
    one_of,
    option,
    register,
)

CITATION = """@article{song2024sharelora,
  title   = {{ShareLoRA}: Parameter Efficient and Robust Large Language Model Fine-tuning via Shared Low-Rank
             Adaptation},
  author  = {Song, Yurun and Zhao, Junchen and Harris, Ian G. and Jyothi, Sangeetha Abdu},
  journal = {arXiv preprint arXiv:2406.10785},
  year    = {2024}
}"""


@dataclass(repr=False, eq=False)
class ShareLoRAConfig(MethodConfig):
    """Config of ShareLoRA (arXiv 2406.10785).

    Layers share by role and shape: the queries of all layers have one A, the values another.

    Args:
        share: the factors that layers share, "A", "B" or "AB". The paper finds "A" the best.

    Raises:
        ConfigError: `share` is something else.
    """

    share: Literal["A", "B", "AB"] = option(
        "A", "The factors that all layers share: 'A', 'B' or 'AB'.", one_of("A", "B", "AB")
    )


def tensors(config: ShareLoRAConfig, site: Site) -> dict[str, TensorSpec]:
    """A (r, d_in) and B (d_out, r); the factors that `share` names are shared by the sites of one role and shape."""
    specs = low_rank(config.r, site.d_in, site.d_out, config.init_weights)
    return {key: replace(spec, shared=site.kind) if key in config.share else spec for key, spec in specs.items()}


def pair(config: ShareLoRAConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """A, scale B."""
    return FactorPair(t["A"], config.scale_of(config.r) * t["B"])


METHOD = Method(
    "sharelora",
    ShareLoRAConfig,
    tensors,
    pair,
    Card("ShareLoRA", "2406.10785", "LoRA whose A, B or both are shared by all layers", CITATION),
)
register(METHOD)
