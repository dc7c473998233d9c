"""The update of all experts of a layer, where one parameter holds their weights: a sum of terms, batches of pairs.

A method's `pair` is written for one linear layer; torch.vmap computes it for all experts, or groups of them, at once.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ziggurat.host.method import EVALUATION, Context, Method, Part, Stored
from ziggurat.host.site import Site
from ziggurat.host.tensors import TensorSpec
from ziggurat.lowrank.pair import FactorPair


class ExpertTerm(NamedTuple):
    """A summand of the update of all experts of a layer.

    `starts`: the first expert of each group that has a pair of its own: A (groups, rank, d_in) and B (groups, d_out,
    rank). One group: all experts share the pair A (rank, d_in), B (d_out, rank).
    """

    starts: tuple[int, ...]
    pair: FactorPair


#: Key -> the first expert of each group of experts that has one of this tensor.
Starts = Mapping[str, tuple[int, ...]]


def starts_of(specs: Mapping[str, TensorSpec]) -> Starts:
    """The division of the experts by each tensor of a site of experts."""
    return {key: spec.experts for key, spec in specs.items()}  # type: ignore[misc]


def expert_terms(
    method: Method, config: Any, site: Site, starts: Starts, stored: Stored, context: Context = EVALUATION
) -> list[ExpertTerm]:
    """The update of all experts of a layer: `pair` for each expert or group of experts at once, by torch.vmap.

    A method whose update is a sum over tensors has a term for each division of the experts; another has one term.
    """
    assert method.pair is not None and site.num_experts is not None
    divisions = dict.fromkeys(starts.values()) if method.sums else [None]
    terms: list[ExpertTerm] = []
    for division in divisions:
        keys = [key for key, groups in starts.items() if division is None or groups == division]
        several = [starts[key] for key in keys if len(starts[key]) > 1]
        lead: Any = several[0] if several else (0,)
        if any(groups != lead for groups in several):
            lead = tuple(range(site.num_experts))
        t = {
            key: stored[key] if starts[key] in ((0,), lead) else stored[key][_group_of(lead, starts[key])]
            for key in keys
        }
        compute = partial(_pair, method, config, site, context)
        if len(lead) > 1:
            compute = torch.vmap(compute, in_dims=({key: None if starts[key] == (0,) else 0 for key in keys},))
        terms.append(ExpertTerm(lead, compute(t)))
    return terms


def for_each_expert(terms: Sequence[ExpertTerm], site: Site) -> FactorPair:
    """The sum of `terms` as one pair for each expert: A (experts, rank, d_in), B (experts, d_out, rank)."""
    experts = range(site.num_experts or 0)
    spread = [
        FactorPair(
            *(
                half.expand(len(experts), -1, -1) if half.dim() == 2 else half[_group_of(experts, starts)]
                for half in pair
            )
        )
        for starts, pair in terms
    ]
    if len(spread) == 1:
        return spread[0]
    return FactorPair(torch.cat([A for A, _ in spread], dim=-2), torch.cat([B for _, B in spread], dim=-1))


def of_expert(
    specs: Mapping[str, TensorSpec], stored: Stored, expert: int, num_experts: int
) -> tuple[dict[str, Tensor], dict[str, range]]:
    """The tensors of one expert, as a linear layer has them, and the experts that have each of these in common."""
    t: dict[str, Tensor] = {}
    members: dict[str, range] = {}
    for key, spec in specs.items():
        starts: Any = spec.experts
        group = bisect_right(starts, expert) - 1
        t[key] = stored[key] if len(starts) == 1 else stored[key][group]
        members[key] = range(starts[group], (*starts, num_experts)[group + 1])
    return t, members


def expert_pair(method: Method, config: Any, site: Site, t: Stored) -> FactorPair:
    """The pair of one expert, from its tensors alone."""
    return _pair(method, config, site, EVALUATION, t)


def expert_parts(method: Method, config: Any, site: Site, t: Stored) -> list[Part]:
    """The named parts of the update of one expert, from its tensors alone."""
    if method.parts is None:
        return [Part(method.name, expert_pair(method, config, site, t), tuple(t))]
    return method.parts(config, site, t)


def _pair(method: Method, config: Any, site: Site, context: Context, t: Stored) -> FactorPair:
    return method.pair(config, site, t, context)  # type: ignore[misc]


def _group_of(experts: Sequence[int], starts: Any) -> list[int]:
    """The number of the group, of those that begin with `starts`, that each of `experts` is in."""
    return [bisect_right(starts, expert) - 1 for expert in experts]
