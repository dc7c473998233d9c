"""Experts by layers: how much of its update each expert has, and how much of that it shares with others."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import measures
from .components import UPDATE, Collected

#: The columns of `experts.csv` that are drawn, with their titles.
VALUES = {"norm": "norm of the update", "shared": "energy that is shared"}


def maps(collected: Collected, stack: str | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Role -> "norm" and "shared" -> (N, E) of E experts in each of N layers; only roles that experts have.

    `norm` is ||B A||_F of an expert's whole update. `shared` is, of the energies ||B A||_F^2 of the parts that act in
    it, the share of those that other experts have, too: 0 where each expert has all for itself, NaN where parts
    multiply or nothing was trained.
    """
    stack = measures.stack_of(collected, stack)
    components = [c for c in collected.components if c.stack == stack and c.experts is not None]
    roles = list(dict.fromkeys(c.family for c in components))
    by_role: dict[str, dict[str, np.ndarray]] = {}
    for role in roles:
        of_role = [c for c in components if c.family == role]
        shape = (collected.layers[stack], max(c.experts.stop for c in of_role))  # type: ignore[union-attr]
        norm, energy, common = (np.full(shape, np.nan) for _ in range(3))
        composed = UPDATE if any(c.part == UPDATE for c in of_role) else of_role[0].part
        for c in of_role:
            at = np.ix_(list(c.layers), list(c.experts or ()))
            squared = float(np.square(c.singular_values).sum())
            if c.part == composed:
                norm[at] = squared**0.5
            if c.stored:
                energy[at] = np.nan_to_num(energy[at]) + squared
                common[at] = np.nan_to_num(common[at]) + (squared if len(c.experts or ()) > 1 else 0.0)
        adds = all(c.adds for c in of_role)
        shared = np.divide(common, energy, out=np.full(shape, np.nan), where=(energy > 0) & adds)
        by_role[role] = {"norm": norm, "shared": shared}
    return by_role


def rows(collected: Collected) -> list[dict[str, Any]]:
    """A line for each expert of each layer and role, with the values of `maps`; empty where there are no experts."""
    return [
        {"stack": stack, "role": role, "layer": layer, "expert": expert}
        | {name: float(grid[layer, expert]) for name, grid in by_value.items()}
        for stack in collected.layers
        for role, by_value in maps(collected, stack).items()
        for layer, expert in np.ndindex(by_value["norm"].shape)
        if not np.isnan(by_value["norm"][layer, expert])
    ]


def sentences(collected: Collected) -> list[str]:
    """A line for the terminal on each role that experts have."""
    lines = []
    for stack in collected.layers:
        for role, by_value in maps(collected, stack).items():
            norm, shared = (grid[np.isfinite(grid)] for grid in by_value.values())
            if not norm.size:
                continue
            layers, number = np.isfinite(by_value["norm"]).any(1).sum(), by_value["norm"].shape[1]
            text = f"{role}: {number} experts in {layers} layers, norm {norm.min():.3f} to {norm.max():.3f}"
            if shared.size:
                spread = f"{shared.mean():.0%} ({shared.min():.0%} to {shared.max():.0%})"
                text += f"; tiers that experts share hold {spread} of the energy"
            lines.append(text)
    return lines
