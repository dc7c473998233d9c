"""The pyramid: its tiers, and the groups of layers and experts that share a pair.

dW = dW_global + dW_mid + dW_layer for every adapted linear layer (MSPLoRA, arXiv 2503.21838,
Eq. 3), each a factor pair (Eq. 4). Pure functions of the config and of a site.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt
from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.host.site import Site
from ziggurat.host.tensors import first_experts
from ziggurat.host.values import MOST_RANK, check_above_zero, is_whole, shown

#: One group per layer: nothing is shared.
EVERY_LAYER = "layers"
#: One group per expert: each has a pair of its own.
EVERY_EXPERT = "experts"
TIER_FIELDS = ("name", "groups", "expert_groups", "r", "lora_alpha")
#: The most tiers a pyramid may have, and letters a tier's name.
MOST_TIERS = 64
#: Groups of layers or of experts: how many, the first member of each, or one of the two words.
Groups = int | tuple[int, ...] | str


def first_members(groups: Groups, count: int) -> tuple[int, ...]:
    """The first layer, or expert, of each group of `count` of them: n is in group floor(n G / count) of G groups."""
    if isinstance(groups, tuple):
        return groups
    return first_experts(count if isinstance(groups, str) else groups, count)


@dataclass(frozen=True)
class Tier:
    """One level of the pyramid.

    `groups`: the number of contiguous groups of layers, equal parts of the depth, or the first layer of each group, or
    `"layers"`: one group a layer.
    `expert_groups`: likewise for the experts of a layer, or `"experts"`: one group an expert. A tier with more than one
    group of experts acts at experts only.
    `at_most`: an automatic number of groups, which becomes the depth on shallower stacks.
    """

    name: str
    groups: Groups
    r: int
    lora_alpha: float
    use_rslora: bool = False
    at_most: bool = False
    expert_groups: Groups = 1

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.lora_alpha / self._divisor

    @property
    def _divisor(self) -> float:
        return sqrt(self.r) if self.use_rslora else self.r

    def scaled(self, scale: float) -> "Tier":
        """This tier with the alpha that gives it `scale`."""
        return replace(self, lora_alpha=scale * self._divisor)

    def group_of(self, layer: int, num_layers: int) -> int:
        """The group of layer n of N, from 0."""
        groups = min(int(self.groups), num_layers) if self.at_most else self.groups  # type: ignore[arg-type]
        return bisect_right(first_members(groups, num_layers), layer) - 1

    def expert_group_of(self, site: Site) -> int:
        """The group of the expert at `site`, which is a linear layer of its own."""
        assert site.expert is not None and site.num_experts is not None
        return bisect_right(self.experts_of(site.num_experts), site.expert) - 1

    def experts_of(self, num_experts: int) -> tuple[int, ...]:
        """The first expert of each group, of a layer with so many experts."""
        return first_members(self.expert_groups, num_experts)

    def check(self, site: Site) -> None:
        """Raise ConfigError unless this tier's groups fit the stack and the experts of `site`."""
        groups, experts = self.expert_groups, site.num_experts
        if experts is not None and (groups if isinstance(groups, int) else self.experts_of(experts)[-1] + 1) > experts:
            raise ConfigError(
                f"expert_groups={shown(self.expert_groups)} of tier {self.name!r}: {site.path!r} has the experts 0 "
                f"to {experts - 1}. Give at most {experts} groups, or the first expert of each."
            )
        if isinstance(self.groups, int) and not self.at_most and self.groups > site.num_layers:
            raise ConfigError(
                f"num_groups={self.groups}, but the stack {site.stack_path!r} has {site.num_layers} layers: at most "
                f"{site.num_layers} groups (tier {self.name!r}). Lower num_groups or give group_starts=[...]."
            )
        if isinstance(self.groups, tuple) and self.groups[-1] >= site.num_layers:
            raise ConfigError(
                f"group_starts={list(self.groups)}: the last group would begin at layer {self.groups[-1]}, but the "
                f"stack {site.stack_path!r} has layers 0 to {site.num_layers - 1} (tier {self.name!r})."
            )


def role_of(leaf: str) -> str:
    """The role of the linear layers that share the tensor called `leaf`."""
    return leaf.split(":")[1].replace("/", ".")


def halved_tiers(config: Any, experts: bool) -> tuple[Tier, ...]:
    """The paper's three tiers: global, mid, layer, of ranks r, r/2, r/4 (Eq. 6), each scaled by its own alpha / rank.

    At experts they are global, layer, expert: shared by all experts of all layers, by those of a layer, private.

    A rank that would fall below one is one, so that small r work: 2, 1, 1.

    Raises:
        ConfigError: a rank above one isn't whole, or `ranks` aren't three.
    """
    ranks = config.ranks
    if ranks is None:
        ranks = [_divided(config.r, config.rank_decay, step) for step in range(3)]
    if len(ranks) != 3:
        raise ConfigError(
            f"ranks={shown(list(ranks))}: three ranks are needed, for the global, mid and layer tier. For more or "
            "fewer tiers give tiers=[...]."
        )

    def tier(number: int, name: str, groups: Groups, **more: Any) -> Tier:
        return Tier(name, groups, ranks[number], config.lora_alpha, config.use_rslora, **more)

    coarse = tier(0, "global", 1)
    if experts:
        return coarse, tier(1, "layer", EVERY_LAYER), tier(2, "expert", EVERY_LAYER, expert_groups=EVERY_EXPERT)
    starts, number = config.group_starts, config.num_groups
    automatic = starts is None and number is None
    groups: Any = 3 if automatic else number if starts is None else tuple(starts)
    return coarse, tier(1, "mid", groups, at_most=automatic), tier(2, "layer", EVERY_LAYER)


def _divided(r: int, rank_decay: int, step: int) -> int:
    divisor = rank_decay**step
    if r > divisor and r % divisor:
        unit = rank_decay**2
        fits = " or ".join(str(k * unit) for k in sorted({max(r // unit, 1), -(-r // unit)}))
        raise ConfigError(
            f"r={r} with rank_decay={rank_decay}: the tiers' ranks r, r/{rank_decay}, r/{rank_decay**2} must be "
            f"whole numbers. Use r={fits}, another rank_decay, or give ranks=[global, mid, layer]."
        )
    return max(r // divisor, 1)


def listed_tiers(config: Any) -> tuple[Tier, ...]:
    """Tiers given one by one, coarse to fine: dicts of `name`, `groups` and, if they differ, the other `TIER_FIELDS`.

    Raises:
        ConfigError: an unknown or missing field, or two tiers of one name.
    """
    tiers = []
    if len(config.tiers) > MOST_TIERS:
        raise ConfigError(f"tiers has {len(config.tiers):,} entries: at most {MOST_TIERS}.")
    for position, entry in enumerate(config.tiers):
        unknown = sorted(map(str, set(entry) - set(TIER_FIELDS))) if isinstance(entry, dict) else []
        if not isinstance(entry, dict) or unknown or not isinstance(entry.get("name"), str) or "groups" not in entry:
            problem = f"unknown field {shown(unknown[0])}" if unknown else "name and groups are needed"
            raise ConfigError(
                f"tiers[{position}]={shown(entry)}: {problem}. A tier has the fields {', '.join(TIER_FIELDS)}; "
                'groups is a number, a list of first layers, or "layers".'
            )
        groups, experts = (
            tuple(value) if isinstance(value, list | tuple) else value
            for value in (entry["groups"], entry.get("expert_groups", 1))
        )
        r, alpha = entry.get("r", config.r), entry.get("lora_alpha", config.lora_alpha)
        tiers.append(Tier(entry["name"], groups, r, alpha, config.use_rslora, expert_groups=experts))
    return tuple(tiers)


def check_tiers(tiers: Sequence[Tier]) -> None:
    """Raise ConfigError unless names, ranks, groups and alphas are possible in any model."""
    if not tiers:
        raise ConfigError('tiers=[]: at least one tier is needed, for example {"name": "global", "groups": 1}.')
    names = [tier.name for tier in tiers]
    for tier in tiers:
        fits = tier.name.isidentifier() and not tier.name[-1].isdigit() and len(tier.name) <= MOST_TIERS
        if not fits or names.count(tier.name) > 1:
            raise ConfigError(
                f"tier name {shown(tier.name)}: a name is letters and underscores, at most {MOST_TIERS}, doesn't end "
                "in a digit, and is used once."
            )
        if not is_whole(tier.r, 1, MOST_RANK):
            raise ConfigError(
                f"rank {shown(tier.r)} of tier {tier.name!r}: a whole number of at least 1 is needed (at most "
                f"{MOST_RANK:,})."
            )
        check_above_zero(f"lora_alpha of tier {tier.name!r}", tier.lora_alpha)
        _check_groups(tier)
        if not _can_be(tier.expert_groups, EVERY_EXPERT):
            raise ConfigError(
                f"expert_groups={shown(tier.expert_groups)} of tier {tier.name!r}: a number of groups of at least 1, a "
                'list of first experts, from 0 and rising, such as [0, 32], or "experts" for one group an expert.'
            )


def _can_be(groups: Any, each: str) -> bool:
    """Whether `groups` can be groups in a model with enough members; `each`: the word for one group each."""
    if isinstance(groups, tuple):
        numbers = all(is_whole(first, 0, MOST_RANK) for first in groups)
        return groups[:1] == (0,) and numbers and all(a < b for a, b in pairwise(groups))
    return groups == each or is_whole(groups, 1)


def _check_groups(tier: Tier) -> None:
    groups = tier.groups
    if _can_be(groups, EVERY_LAYER):
        return
    if isinstance(groups, tuple) and groups and all(is_whole(g, -MOST_RANK, MOST_RANK) for g in groups):
        raise ConfigError(
            f"group_starts={shown(list(groups))} (tier {tier.name!r}): the first layer of each group, from 0 and "
            "rising, for example [0, 4, 8]."
        )
    raise ConfigError(
        f"groups={shown(groups)} of tier {tier.name!r}: a number of groups of at least 1, a list of first layers such "
        'as [0, 4, 8], or "layers" for one group a layer.'
    )
