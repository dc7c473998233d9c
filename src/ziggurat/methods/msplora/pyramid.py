"""The pyramid: its tiers, and the groups of layers and experts that share a pair.

dW = dW_global + dW_mid + dW_layer for every adapted linear (MSPLoRA, arXiv 2503.21838,
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


@dataclass(frozen=True)
class Tier:
    """One level of the pyramid.

    `groups`: into how many contiguous groups of layers the depth is cut (equal parts),
    or the first layer of each group, or `"layers"`: one group a layer.
    `expert_groups`: likewise for the experts of a layer, or `"experts"`: one group an expert. A tier with more than one
    group of experts acts at experts only.
    `at_most`: an automatic number of groups, which becomes the depth on shallower stacks.
    """

    name: str
    groups: int | tuple[int, ...] | str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    at_most: bool = False
    expert_groups: int | tuple[int, ...] | str = 1

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
        """The group of layer n of N (from 0): floor(n G / N) for G groups; the last boundary at or before n."""
        if self.groups == EVERY_LAYER:
            return layer
        if isinstance(self.groups, tuple):
            return bisect_right(self.groups, layer) - 1
        number = int(self.groups)
        if self.at_most:
            number = min(number, num_layers)
        return layer * number // num_layers

    def expert_group_of(self, site: Site) -> int:
        """The group of the expert at `site`, which is a linear layer of its own."""
        assert site.expert is not None and site.num_experts is not None
        groups = self.experts_of(site.num_experts)
        starts = first_experts(groups, site.num_experts) if isinstance(groups, int) else groups
        return bisect_right(starts, site.expert) - 1

    def experts_of(self, num_experts: int) -> int | tuple[int, ...]:
        """`expert_groups` for a layer of so many experts, as a `TensorSpec` has it."""
        return num_experts if self.expert_groups == EVERY_EXPERT else self.expert_groups  # type: ignore[return-value]

    def check(self, site: Site) -> None:
        """Raise ConfigError unless this tier's groups fit the stack and the experts of `site`."""
        if site.num_experts is not None:
            groups = self.experts_of(site.num_experts)
            needed = groups if isinstance(groups, int) else groups[-1] + 1
            if needed > site.num_experts:
                raise ConfigError(
                    f"expert_groups={shown(self.expert_groups)} of tier {self.name!r}: {site.path!r} has the experts 0 "
                    f"to {site.num_experts - 1}. Give at most {site.num_experts} groups, or the first expert of each."
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


def halved_tiers(
    r: int,
    lora_alpha: float,
    use_rslora: bool,
    num_groups: int | None,
    group_starts: Sequence[int] | None,
    rank_decay: int,
    ranks: Sequence[int] | None,
    experts: bool = False,
) -> tuple[Tier, ...]:
    """The paper's three tiers: global, mid, layer, of ranks r, r/2, r/4 (Eq. 6), each scaled by its own alpha / rank.

    At experts they are global, layer, expert: shared by all experts of all layers, by those of a layer, private.

    A rank that would fall below one is one, so that small r work: 2, 1, 1.

    Raises:
        ConfigError: a rank above one isn't whole, or `ranks` aren't three.
    """
    if ranks is None:
        ranks = tuple(_divided(r, rank_decay, step) for step in range(3))
    if len(ranks) != 3:
        raise ConfigError(
            f"ranks={shown(list(ranks))}: three ranks are needed, for the global, mid and layer tier. For more or "
            "fewer tiers give tiers=[...]."
        )
    mid = tuple(group_starts) if group_starts is not None else (3 if num_groups is None else num_groups)
    at_most = group_starts is None and num_groups is None
    levels: tuple[tuple[Any, ...], ...] = (
        (("global", 1, False, 1), ("layer", EVERY_LAYER, False, 1), ("expert", EVERY_LAYER, False, EVERY_EXPERT))
        if experts
        else (("global", 1, False, 1), ("mid", mid, at_most, 1), ("layer", EVERY_LAYER, False, 1))
    )
    return tuple(
        Tier(name, groups, rank, lora_alpha, use_rslora, auto, expert_groups)
        for (name, groups, auto, expert_groups), rank in zip(levels, ranks, strict=True)
    )


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


def listed_tiers(entries: Sequence[dict[str, Any]], r: int, lora_alpha: float, use_rslora: bool) -> tuple[Tier, ...]:
    """Tiers given one by one, coarse to fine: dicts of `name`, `groups` and, if they differ, the other `TIER_FIELDS`.

    Raises:
        ConfigError: an unknown or missing field, or two tiers of one name.
    """
    tiers = []
    if len(entries) > MOST_TIERS:
        raise ConfigError(f"tiers has {len(entries):,} entries: at most {MOST_TIERS}.")
    for position, entry in enumerate(entries):
        unknown = sorted(map(str, set(entry) - set(TIER_FIELDS))) if isinstance(entry, dict) else []
        if not isinstance(entry, dict) or unknown or not isinstance(entry.get("name"), str) or "groups" not in entry:
            problem = f"unknown field {shown(unknown[0])}" if unknown else "name and groups are needed"
            raise ConfigError(
                f"tiers[{position}]={shown(entry)}: {problem}. A tier has the fields {', '.join(TIER_FIELDS)}; "
                'groups is a number, a list of first layers, or "layers".'
            )
        groups, experts = entry["groups"], entry.get("expert_groups", 1)
        tiers.append(
            Tier(
                entry["name"],
                tuple(groups) if isinstance(groups, list | tuple) else groups,
                entry.get("r", r),
                entry.get("lora_alpha", lora_alpha),
                use_rslora,
                expert_groups=tuple(experts) if isinstance(experts, list | tuple) else experts,
            )
        )
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
        experts = tier.expert_groups
        listed = isinstance(experts, tuple) and experts[:1] == (0,) and all(is_whole(e, 0, MOST_RANK) for e in experts)
        rising = listed and all(a < b for a, b in pairwise(experts))  # type: ignore[arg-type]
        if not (rising or experts == EVERY_EXPERT or is_whole(experts, 1, MOST_RANK)):
            raise ConfigError(
                f"expert_groups={shown(experts)} of tier {tier.name!r}: a number of groups of at least 1, a list of "
                'first experts, from 0 and rising, such as [0, 32], or "experts" for one group an expert.'
            )


def _check_groups(tier: Tier) -> None:
    groups = tier.groups
    if groups == EVERY_LAYER or is_whole(groups, 1):
        return
    if isinstance(groups, tuple) and groups and all(is_whole(g, -MOST_RANK, MOST_RANK) for g in groups):
        rising = all(a < b for a, b in pairwise(groups))
        if groups[0] == 0 and rising:
            return
        raise ConfigError(
            f"group_starts={shown(list(groups))} (tier {tier.name!r}): the first layer of each group, from 0 and "
            "rising, for example [0, 4, 8]."
        )
    raise ConfigError(
        f"groups={shown(groups)} of tier {tier.name!r}: a number of groups of at least 1, a list of first layers such "
        'as [0, 4, 8], or "layers" for one group a layer.'
    )
