"""Similarity of the tiers of one adapter: cosine of their updates, overlap and angles of their subspaces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from . import measures
from .components import Collected, Component


def smallest_angle(a: Component, b: Component, side: str = "input") -> float:
    """The smallest principal angle, in degrees, between the row ("input") or column ("output") spaces of B A.

    cos of it is the largest singular value of Q_a^T Q_b, of orthonormal bases [Björck & Golub 1973]. NaN for zeros.
    """
    if a.shape != b.shape or not (a.finite and b.finite):
        return math.nan
    first, second = (c.spaces[0 if side == "output" else 1] for c in (a, b))
    if not min(first.shape[1], second.shape[1]):
        return math.nan
    largest = float(np.linalg.svd((first.T @ second).double().numpy(), compute_uv=False)[0])
    return math.degrees(math.acos(min(1.0, largest)))


def rows(collected: Collected) -> list[dict[str, Any]]:
    """A line for each pair of tiers and each stack: means over the linear layers that both act on.

    Empty for parts that multiply (planes).
    """
    if not collected.adds_up:
        return []
    lines = []
    for stack in collected.layers:
        for first, second in combinations(collected.stored_parts, 2):
            pairs = list(_on_one_linear(collected, first, second, stack))
            if not pairs:
                continue
            by_measure = {
                "cosine": [measures.cosine(a, b) for a, b in pairs],
                **{f"overlap_{side}": [measures.overlap(a, b, side) for a, b in pairs] for side in ("input", "output")},
                **{f"angle_{side}": [smallest_angle(a, b, side) for a, b in pairs] for side in ("input", "output")},
            }
            means = {name: measures.mean(values) for name, values in by_measure.items()}
            lines.append({"stack": stack, "part": first, "other": second, "pairs": len(pairs), **means})
    return lines


def _on_one_linear(collected: Collected, first: str, second: str, stack: str) -> Iterator[tuple[Component, Component]]:
    for a in collected.of(first):
        for b in collected.of(second):
            if (
                a.stack == b.stack == stack
                and a.role == b.role
                and set(a.layers) & set(b.layers)
                and a.shape == b.shape
            ):
                yield a, b
