"""The allocation of ranks to tiers, and the boundaries of groups: pure functions of measurements.

Symbols: tier t holds P_t pairs, so one rank of it costs c_t = sum over its pairs of (d_in + d_out); gain g_t[k] is the
gain of its k-th direction, over all linear layers that it reaches. With `by_role` each role of a tier counts as a tier,
under the key `<tier>:<role>`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ziggurat.analysis import Collected, Component, measures
from ziggurat.analysis.measures import kl_matrix
from ziggurat.errors import ConfigError
from ziggurat.host.bank import Bank
from ziggurat.host.tensors import tier_of
from ziggurat.methods.msplora.pyramid import role_of

CRITERIA = ("energy", "sensitivity", "effective_rank", "stable_rank")


def costs(collected: Collected, by_role: bool = False) -> dict[str, int]:
    """Tier -> parameters of one rank of all its pairs."""
    return {key: sum(sum(c.shape) for c in components) for key, components in _shared_out(collected, by_role).items()}


def energies(collected: Collected, by_role: bool = False) -> dict[str, np.ndarray]:
    """Tier -> (rank,) sum of s_k^2 over its linear layers: the squared norm of its k-th directions."""
    by_tier = {}
    for key, components in _shared_out(collected, by_role).items():
        gains = np.zeros(max(c.rank for c in components))
        for c in components:
            values = np.square(np.nan_to_num(c.singular_values))
            gains[: len(values)] += values * max(1, len(c.layers))
        by_tier[key] = gains
    return by_tier


def widths(collected: Collected, criterion: str, by_role: bool = False) -> dict[str, float]:
    """Tier -> mean "effective_rank" or "stable_rank" of its components that aren't zero."""
    by_tier = {}
    for key, components in _shared_out(collected, by_role).items():
        values = [measures.row(c)[criterion] for c in components if c.finite and not c.zero]
        by_tier[key] = float(np.mean(values)) if values else 0.0
    return by_tier


def _shared_out(collected: Collected, by_role: bool) -> dict[str, list[Component]]:
    by_key: dict[str, list[Component]] = {}
    for part in collected.stored_parts:
        for c in collected.of(part):
            by_key.setdefault(f"{part}:{c.role}" if by_role else part, []).append(c)
    return by_key


@torch.no_grad()
def sensitivities(model: nn.Module, adapter: str = "default", by_role: bool = False) -> dict[str, np.ndarray]:
    """Tier -> (rank,) sum over its pairs of the mean |w dL/dw| of each direction's entries, largest first.

    LoRA²'s and AdaLoRA's sensitivity, from the gradients that lie in the pyramid now; averages over steps are the
    caller's. A shared pair's gradient holds all layers that read it.
    """
    gains_by_tier: dict[str, np.ndarray] = {}
    for bank in (module for module in model.modules() if isinstance(module, Bank)):
        factors = bank.factors(adapter)
        for name in (leaf for leaf in factors.names() if leaf.rpartition(":")[2].startswith("A_")):
            group, _, key = name.rpartition(":")
            A, B = factors[name], factors[f"{group}:B_{key[2:]}"]
            if A.grad is None or B.grad is None:
                continue
            score = (A * A.grad).abs().mean(1) + (B * B.grad).abs().mean(0)
            values = score.sort(descending=True).values.cpu().double().numpy()
            key = f"{tier_of(name)}:{role_of(name)}" if by_role else tier_of(name)
            gains_by_tier[key] = gains_by_tier.get(key, np.zeros(len(values))) + values
    return gains_by_tier


def by_gain(gains: Mapping[str, np.ndarray], cost: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks by a greedy choice: one for each tier, then the direction with the largest gain per parameter that fits.

    Raises:
        ConfigError: one rank for each tier is above the budget.
    """
    most = {tier: len(values) for tier, values in gains.items()}
    return _by_greed(most, cost, budget, lambda tier, rank: float(gains[tier][rank]) / cost[tier])


def by_width(width: Mapping[str, float], cost: Mapping[str, int], budget: int, most: int) -> dict[str, int]:
    """Ranks in proportion to `width`, at least 1 and at most `most`, as large as the budget allows.

    Raises:
        ConfigError: one rank for each tier is above the budget.
    """
    highest = {tier: most if share > 0 else 1 for tier, share in width.items()}
    return _by_greed(highest, cost, budget, lambda tier, rank: -rank / width[tier])


def _by_greed(
    most: Mapping[str, int], cost: Mapping[str, int], budget: int, value: Callable[[str, int], float]
) -> dict[str, int]:
    """One rank for each tier; then one more for the tier with the largest `value` at its rank, until none fits.

    `most`: the largest rank of each tier.
    """
    ranks, spent = dict.fromkeys(most, 1), sum(cost.values())
    check_budget(spent, budget)
    while open_ := [tier for tier in ranks if ranks[tier] < most[tier] and spent + cost[tier] <= budget]:
        best = max(open_, key=lambda tier: value(tier, ranks[tier]))
        ranks[best] += 1
        spent += cost[best]
    return ranks


def boundaries(distance: Sequence[float] | np.ndarray, groups: int, shortest: int = 1) -> list[int]:
    """First layers of `groups` contiguous groups, cut where neighbouring layers differ most.

    `distance[n]` lies between layers n and n + 1. Of all cuts that leave every group `shortest` layers the one with the
    largest sum; the earliest of equals. NaN counts as 0.

    Raises:
        ConfigError: there are fewer layers than groups x shortest.
    """
    layers = len(distance) + 1
    if groups * shortest > layers:
        raise ConfigError(f"{groups} groups of at least {shortest} layers, but there are {layers} layers.")
    values = np.nan_to_num(np.asarray(distance, dtype=float))
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(1, 0): (0.0, [0])}
    for count in range(2, groups + 1):
        for start in range(shortest * (count - 1), layers - shortest * (groups - count + 1) + 1):
            before = [best[count - 1, s] for s in range(start - shortest + 1) if (count - 1, s) in best]
            total, starts = max(before, key=lambda item: item[0])
            best[count, start] = (total + float(values[start - 1]), [*starts, start])
    ends = [value for (count, _), value in best.items() if count == groups]
    return max(ends, key=lambda item: item[0])[1]


def layer_distance(collected: Collected) -> np.ndarray:
    """(N - 1,) KL(P_n || P_n+1) + KL(P_n+1 || P_n) of the layer tier's spectra (Eq. 9 and 10), mean over roles.

    Of the private tier alone: shared tiers are equal inside the probe's own groups, and would repeat its boundaries.
    """
    grid = kl_matrix(collected)
    return np.diagonal(grid, 1) + np.diagonal(grid, -1)


def check_budget(least: int, budget: int) -> None:
    """Raise ConfigError if a budget is below `least`, the cost of one rank for each tier."""
    if least > budget:
        raise ConfigError(f"a budget of {budget:,} parameters, but one rank for each tier takes {least:,}. Raise it.")
