"""Similarity of the tiers of one adapter: cosine of their updates, overlap and angles of their subspaces."""

import math
from itertools import combinations
from typing import Any

import torch

from . import measures
from .components import Collected, Component


def smallest_angle(a: Component, b: Component, side: str = "input") -> float:
    """The smallest principal angle, in degrees, between the row ("input") or column ("output") spaces of B A.

    cos of it is the largest singular value of Q_a^T Q_b, of orthonormal bases [Björck & Golub 1973]. NaN for zeros.
    """
    product = measures.between_spaces(a, b, side).double()
    if not product.numel():
        return math.nan
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(product)[0]))))


def rows(collected: Collected) -> list[dict[str, Any]]:
    """A line for each pair of tiers and each stack: means over the linear layers of both.

    Empty for parts that multiply (planes).
    """
    if not collected.adds_up:
        return []
    lines = []
    for stack in collected.layers:
        for first, second in combinations(collected.stored_parts, 2):
            pairs = list(measures.on_one_linear(collected, first, second, stack))
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
