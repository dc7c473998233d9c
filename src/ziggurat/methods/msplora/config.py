"""The config of MSPLoRA."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.saved.sites_table import from_table
from ziggurat.host.site import Site
from ziggurat.host.values import MOST_RANK, check_flag, check_list, is_whole, option, shown, whole
from ziggurat.methods.msplora.pyramid import Tier, check_tiers, halved_tiers, listed_tiers

#: The attribute in which a copy for one site caches its pyramids, by role.
_PYRAMIDS = "_pyramids"
#: The most roles that `rank_pattern` may name.
MOST_ROLES = 1000

CITATION = """@article{zhao2025msplora,
  title   = {{MSPLoRA}: A Multi-Scale Pyramid Low-Rank Adaptation for Efficient Model Fine-Tuning},
  author  = {Zhao, Jiancheng and Yu, Xingda and Yang, Zhen},
  journal = {arXiv preprint arXiv:2503.21838},
  year    = {2025}
}"""


@dataclass(repr=False, eq=False)
class MSPLoraConfig(MethodConfig):
    """Config of MSPLoRA (arXiv 2503.21838): a pyramid of factor pairs shared by all, some, or no layers.

    The update of the linear layer of one role in layer n is dW_n = s_g B_g A_g + s_m B_m A_m + s_l B_l A_l (Eq. 3, 4):
    (A_g, B_g), of rank r, is shared by all layers of the stack, (A_m, B_m), of rank r/2, by the layers of n's group,
    (A_l, B_l), of rank r/4, is private. Each scale is lora_alpha over that tier's own rank, or the same for all with
    `even_scales`.

    Args:
        r: rank of the coarsest tier; the next ones have r / rank_decay and r / rank_decay^2.
        num_groups: mid groups, contiguous and equal parts of the depth: layer n of N is in group
            floor(n num_groups / N). None: 3, or the number of layers on a shallower stack.
        group_starts: instead of `num_groups`: the first layer of each mid group, such as [0, 4, 8].
        rank_decay: each tier's rank divided by this gives the next tier's. 1: all tiers have rank r.
        ranks: instead of `r` and `rank_decay`: the ranks of the global, mid and layer tier.
        tiers: instead of all of these: any number of tiers, coarse to fine, each a dict of `name`, `groups`
            (a number, a list of first layers, or "layers") and optionally `r`, `lora_alpha` and `expert_groups`:
            the groups of the experts of a layer (a number, a list of first experts, or "experts"; default 1, all
            share). A tier with more than one group of experts acts at experts only.
        target_parameters: parameters with all experts of a layer, such as "experts.gate_up_proj". Without `tiers` their
            tiers are global (r), shared by all experts of all layers, layer (r/2), shared by the experts of a layer,
            and expert (r/4), private; `num_groups` and `group_starts` don't apply to them.
        rank_pattern: ranks of the tiers, coarse to fine, for linear layers of some roles: {"value": [12, 4, 2]}. A key
            is a role or the end of one, such as "attention.self.value"; the longest that fits counts. Layers of a role
            share pairs, so a role has the same ranks in all of them.
        even_scales: every tier has the scale of the coarsest, lora_alpha / r (rsLoRA: / sqrt(r)), instead of one that
            grows as its rank falls. One learning rate then suits all tiers, and LoRA's suits the pyramid.
        train_in_stages: train the tiers one after the other, coarse to fine, in equal shares of the run.
        bias: "none", "all", or "msplora_only" (the biases of the adapted linear layers).

    Raises:
        ConfigError: values that can't work in any model. Values that don't fit a given model are refused when the
            adapter is put into it, before the model is changed.
    """

    num_groups: int | None = option(None, "Number of mid groups (default: 3).")
    group_starts: list[int] | None = option(None, "First layer of each mid group.", check_list)
    rank_decay: int = option(2, "Each tier's rank divided by this gives the next one's.", whole(1))
    ranks: list[int] | None = option(None, "Ranks of the global, mid and layer tier.", check_list)
    tiers: list[dict[str, Any]] | None = option(None, "Tiers one by one, coarse to fine.", check_list)
    rank_pattern: dict[str, list[int]] | None = option(None, "Ranks of the tiers by role.")
    even_scales: bool = option(False, "Give every tier the scale of the coarsest.", check_flag)
    train_in_stages: bool = option(False, "Train the tiers one after the other.", check_flag)

    not_from_lora: ClassVar[dict[str, str]] = {
        "rank_pattern": "a role has one rank for each tier here, such as {'value': [12, 4, 2]}"
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiers is not None:
            conflicting = [name for name in ("num_groups", "group_starts", "ranks") if getattr(self, name) is not None]
            if conflicting:
                raise ConfigError(f"tiers=[...] defines the whole pyramid; {conflicting[0]} can't be given beside it.")
        if self.num_groups is not None and self.group_starts is not None:
            raise ConfigError("num_groups and group_starts both say where the mid groups lie: give one of them.")
        check_tiers(self._tiers())
        if self.train_in_stages and self.target_parameters and self.tiers is None:
            raise ConfigError(
                "train_in_stages with target_parameters needs tiers=[...]: by default experts have other tiers "
                "(global, layer, expert) than linear layers, and a stage is one tier of all."
            )
        self._check_ranks_of_roles()
        if self.even_scales and any("lora_alpha" in tier for tier in self.tiers or ()):
            raise ConfigError("even_scales gives every tier the coarsest one's scale; leave lora_alpha out of tiers.")

    def pyramid_at(self, site: Site) -> tuple[Tier, ...]:
        """The tiers at `site`. Those with several groups of experts act at experts only."""
        tiers = self.pyramid(site.role, site.fused)
        return tiers if site.num_experts is not None else tuple(tier for tier in tiers if tier.expert_groups == 1)

    @property
    def shares_over_experts(self) -> bool:
        """Whether `tiers` say which experts share; experts that are linear layers have a role each otherwise."""
        return any("expert_groups" in tier for tier in self.tiers or ())

    def pyramid(self, role: str = "", fused: bool = False) -> tuple[Tier, ...]:
        """The tiers, coarse to fine, of linear layers of `role`: with the ranks that `rank_pattern` has for it.

        `fused`: of a parameter with all experts of a layer.
        """
        cache: dict[tuple[str, bool], tuple[Tier, ...]] = self.__dict__.get(_PYRAMIDS, {})
        if (role, fused) in cache:
            return cache[role, fused]
        tiers, key = self._tiers(fused), self.pattern_key(role)
        scale = tiers[0].scale
        if key is not None:
            tiers = tuple(replace(tier, r=r) for tier, r in zip(tiers, self.rank_pattern[key], strict=True))  # type: ignore[index]
        if self.even_scales:
            tiers = tuple(tier.scaled(scale) for tier in tiers)
        cache[role, fused] = tiers
        return tiers

    def at(self, site: Site) -> Self:
        """A copy with the alpha that `alpha_pattern` has for `site`, which works its pyramids out once."""
        config = copy.copy(self)
        config.lora_alpha = self.alpha_at(site)
        config.__dict__[_PYRAMIDS] = {}
        return config

    def check_sites(self, sites: Mapping[str, Site]) -> None:
        used = {self.pattern_key(site.role) for site in sites.values()}
        if unused := sorted(set(self.rank_pattern or {}) - used):
            raise ConfigError(
                f"rank_pattern[{unused[0]!r}]: no adapted linear layer has this role, or longer keys take them all. A "
                "key is the name of a target module, or the end of its path inside the layer, without the layer's "
                "number."
            )

    def pattern_key(self, role: str) -> str | None:
        """The key of `rank_pattern` that counts for `role`."""
        fits = [key for key in self.rank_pattern or {} if role == key or role.endswith(f".{key}")]
        return max(fits, key=len, default=None)

    def _check_ranks_of_roles(self) -> None:
        if self.rank_pattern is None:
            return
        number = len(self._tiers())
        if not isinstance(self.rank_pattern, dict) or not all(isinstance(key, str) for key in self.rank_pattern):
            raise ConfigError(
                f"rank_pattern={shown(self.rank_pattern)}: roles with the ranks of their tiers are needed, such as "
                "{'value': [12, 4, 2]}."
            )
        if len(self.rank_pattern) > MOST_ROLES:
            raise ConfigError(f"rank_pattern has {len(self.rank_pattern):,} roles: at most {MOST_ROLES:,}.")
        for key, ranks in self.rank_pattern.items():
            fits = isinstance(ranks, list | tuple) and len(ranks) == number
            if not fits or not all(is_whole(r, 1, MOST_RANK) for r in ranks):
                raise ConfigError(
                    f"rank_pattern[{shown(key)}]={shown(ranks)}: {number} whole numbers of at least 1 are needed, one "
                    "for each tier, coarse to fine."
                )

    def _tiers(self, fused: bool = False) -> tuple[Tier, ...]:
        return halved_tiers(self, fused) if self.tiers is None else listed_tiers(self)

    @property
    def largest_rank(self) -> int:
        """The rank of its largest tier; of those that act, once it has sites."""
        sites = from_table(self.sites).values() if self.sites else ()
        return max(tier.r for tier in [tier for site in sites for tier in self.pyramid_at(site)] or self._tiers())

    @property
    def stages(self) -> tuple[Tier, ...]:
        """The tiers that train, coarse to fine."""
        return tuple(tier for tier in self.pyramid() if not self.freezes(f"A_{tier.name}"))

    @property
    def needs_stack(self) -> bool:
        """Whether the user has set a field that only makes sense in a stack of layers."""
        fields = (self.num_groups, self.group_starts, self.tiers, self.layers_to_transform, self.layers_pattern)
        return any(value not in (None, []) for value in fields)
