"""MSPLoRA (arXiv 2503.21838): tensors and equation.

dW_n = s_g B_g A_g + s_m B_m A_m + s_l B_l A_l    (Eq. 3 and 4) for the linear layer of one role in layer n: (A_g, B_g)
is shared by all layers of the stack, (A_m, B_m) by the layers of n's group, (A_l, B_l) is private.
"""

from dataclasses import replace

from ziggurat.host.method import Context, Part, Stored
from ziggurat.host.site import Site
from ziggurat.host.tensors import TensorSpec, low_rank
from ziggurat.lowrank.pair import FactorPair, stack
from ziggurat.methods.msplora.config import MSPLoraConfig


def tensors(config: MSPLoraConfig, site: Site) -> dict[str, TensorSpec]:
    """A_t (r_t, d_in) and B_t (d_out, r_t) of each tier t, shared by the sites of one role, shape and group.

    Each group of experts has its own pair, if the tier has several groups.
    """
    specs: dict[str, TensorSpec] = {}
    for tier in config.pyramid_at(site):
        layers = tier.group_of(site.layer, site.num_layers)
        group = f"{site.kind}:{layers}"
        if site.expert is not None and config.shares_over_experts:
            group = f"{site.kind_of_experts}:{layers}:{tier.expert_group_of(site)}"
        pair = low_rank(tier.r, site.d_in, site.d_out, config.init_weights, suffix=f"_{tier.name}", shared=group)
        if site.fused:
            pair = {key: replace(spec, experts=tier.experts_of(site.num_experts or 1)) for key, spec in pair.items()}
        specs |= pair
    return specs


def pair(config: MSPLoraConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """A = [A_g; A_m; A_l], B = [s_g B_g, s_m B_m, s_l B_l]: one product for the sum of all tiers that `t` has."""
    tiers = [tier for tier in config.pyramid_at(site) if f"A_{tier.name}" in t]
    return stack(
        [FactorPair(t[f"A_{tier.name}"], t[f"B_{tier.name}"]) for tier in tiers], [tier.scale for tier in tiers]
    )


def parts(config: MSPLoraConfig, site: Site, t: Stored) -> list[Part]:
    """Each tier's own update at this site."""
    return [
        Part(
            tier.name,
            stack([FactorPair(t[f"A_{tier.name}"], t[f"B_{tier.name}"])], [tier.scale]),
            (f"A_{tier.name}", f"B_{tier.name}"),
            tier.group_of(site.layer, site.num_layers),
        )
        for tier in config.pyramid_at(site)
    ]
