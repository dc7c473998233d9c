"""Measures of an adapter's components, as rows and numpy arrays.

Symbols: a component has the update B A with singular values s_1 >= s_2 >= ...; N is the number of layers of a stack.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ziggurat.errors import ConfigError
from ziggurat.lowrank.pair import inner
from ziggurat.lowrank.spectrum import effective_rank, spectrum_kl, stable_rank, top_k_share

from .components import UPDATE, Collected, Component

#: The default k of M_eff-k: half the rank of the component.
HALF = 0


def row(component: Component, k: int = HALF) -> dict[str, Any]:
    """The measures of one component.

    `m_eff` is M_eff-k (arXiv 2503.21838, Eq. 8) for the `m_eff_k` largest values, `norm` the Frobenius norm
    sqrt(sum s^2), `spectral_norm` s_1, `nuclear_norm` sum s. All NaN where a factor isn't finite.
    """
    s = torch.from_numpy(component.singular_values)
    take = k or max(1, component.rank // 2)
    first, last = (component.layers[0], component.layers[-1]) if component.layers else (None, None)
    return {
        "part": component.part,
        "stack": component.stack,
        "first_layer": first,
        "last_layer": last,
        "role": component.role,
        "d_out": component.shape[0],
        "d_in": component.shape[1],
        "rank": component.rank,
        "parameters": component.parameters,
        "norm": float(s.square().sum().sqrt()),
        "spectral_norm": float(s[0]),
        "nuclear_norm": float(s.sum()),
        "m_eff_k": take,
        "m_eff": float(top_k_share(s, take)),
        "effective_rank": float(effective_rank(s)),
        "stable_rank": float(stable_rank(s)),
    }


def rows(collected: Collected, k: int = HALF) -> list[dict[str, Any]]:
    """`row` of every component, in the order of `Collected`."""
    return [row(component, k) for component in collected.components]


def spectra(collected: Collected, part: str) -> np.ndarray:
    """The singular values of a part's components, a row for each, padded with zeros."""
    values = [component.singular_values for component in _some(collected, part)]
    longest = max(map(len, values))
    return np.stack([np.pad(spectrum, (0, longest - len(spectrum))) for spectrum in values])


def mean_spectrum(collected: Collected, part: str, top: int = 8) -> np.ndarray:
    """The `top` largest singular values of a part, (top,), averaged over its components: a column of Fig. 3.

    Components that aren't finite are left out; if there are fewer values than `top`, the rest is NaN.
    """
    values = spectra(collected, part)
    values = values[np.isfinite(values).all(axis=1)]
    mean = values.mean(axis=0)[:top] if len(values) else np.full(0, np.nan)
    return np.pad(mean, (0, top - len(mean)), constant_values=np.nan)


def by_layer_and_role(
    collected: Collected, part: str, value: str = "effective_rank", stack: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """(N, roles) of one measure of `row`, and the roles. A shared component stands in every layer that it reaches.

    The experts of a layer are one role, with their mean.
    """
    stack = stack_of(collected, stack)
    values: dict[str, dict[int, list[float]]] = {}
    for component in (c for c in _some(collected, part) if c.stack == stack):
        by_layer = values.setdefault(component.family, {})
        for layer in component.layers:
            by_layer.setdefault(layer, []).append(row(component)[value])
    grid = np.full((collected.layers[stack], len(values)), np.nan)
    for column, by_layer in enumerate(values.values()):
        for layer, of_layer in by_layer.items():
            grid[layer, column] = mean(of_layer)
    return grid, list(values)


def rank_use(
    collected: Collected, part: str, stack: str, role: str | None = None
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Layers that a pair reaches -> (effective rank, rank), mean over the roles, or of `role` alone."""
    pairs: dict[tuple[int, ...], list[tuple[float, int]]] = {}
    for c in collected.of(part):
        if c.stack == stack and c.layers and role in (None, c.family):
            pairs.setdefault(c.layers, []).append((row(c)["effective_rank"], c.rank))
    return {layers: tuple(float(mean) for mean in np.mean(values, axis=0)) for layers, values in pairs.items()}  # type: ignore[misc]


def energy(collected: Collected, stack: str | None = None) -> dict[str, dict[str, float]]:
    """Part -> role -> mean over the layers of ||B A||_F^2, which each stored part adds to a linear layer of that role.

    The experts of a layer are one role, with their mean. Parts aren't orthogonal, so these don't sum exactly to the
    update's energy. A shared component counts in every layer that it reaches. For planes, which multiply, their update
    counts.
    """
    stack = stack_of(collected, stack)
    parts = collected.stored_parts if all(c.adds for c in collected.components) else [UPDATE]
    by_part: dict[str, dict[str, float]] = {}
    for part in parts:
        sums: dict[str, list[float]] = {}
        for c in collected.of(part):
            if c.stack == stack:
                reached = max(1, len(c.layers)) * len(c.experts or (0,))
                sums.setdefault(c.family, []).extend([float(np.square(c.singular_values).sum())] * reached)
        by_part[part] = {role: float(np.mean(values)) for role, values in sums.items()}
    return by_part


def kl_matrix(collected: Collected, part: str | None = None, stack: str | None = None) -> np.ndarray:
    """(N, N): KL(P_i || P_j) of the normalised spectra of layers i and j (arXiv 2503.21838, Eq. 9 and 10).

    Of the layer tier, or `part`, averaged over the roles that both layers have. NaN where a layer has no component, or
    one of zeros.
    """

    def divergence(a: Component, b: Component) -> float:
        return float(spectrum_kl(torch.from_numpy(a.singular_values), torch.from_numpy(b.singular_values)))

    return _pairwise(collected, part, stack, divergence)


def kl_difference(first: Collected, second: Collected, stack: str | None = None) -> np.ndarray:
    """(N, N): `kl_matrix` of `first` minus that of `second`: the paper's Fig. 4. Positive: `first` is less redundant.

    Raises:
        ConfigError: their stacks differ in depth.
    """
    difference = kl_matrix(first, stack=stack)
    other = kl_matrix(second, stack=stack if stack in second.layers else None)
    if difference.shape != other.shape:
        raise ConfigError(
            f"{first.source} reaches {len(difference)} layers and {second.source} {len(other)}: compare adapters of "
            "models of one depth."
        )
    return difference - other


def cosine_matrix(collected: Collected, part: str | None = None, stack: str | None = None) -> np.ndarray:
    """(N, N): <D_i, D_j>_F / (||D_i|| ||D_j||) of the updates D = B A of layers i and j, mean over roles.

    <D_i, D_j>_F = tr(A_j A_i^T B_i^T B_j), without a d x d matrix.
    """
    return _pairwise(collected, part, stack, cosine)


def overlap_matrix(
    collected: Collected, part: str | None = None, stack: str | None = None, side: str = "input"
) -> np.ndarray:
    """(N, N): overlap of the subspaces of layers i and j, mean cos^2 of the principal angles, mean over roles.

    `side`: "input" compares the row spaces of B A, "output" the column spaces. 1: one space contains the other; two
    random spaces of rank r in d dimensions give about r / d.
    """
    return _pairwise(collected, part, stack, lambda a, b: overlap(a, b, side))


def tier_overlap(collected: Collected, stack: str | None = None, side: str = "input") -> tuple[np.ndarray, list[str]]:
    """(parts, parts): `overlap` of two parts that act on the same linear layer, mean over those; and the parts."""
    stack = stack_of(collected, stack)
    parts = collected.stored_parts
    grid = np.full((len(parts), len(parts)), np.nan)
    for i, first in enumerate(parts):
        for j, second in enumerate(parts):
            grid[i, j] = mean(overlap(a, b, side) for a, b in on_one_linear(collected, first, second, stack))
    return grid, parts


def on_one_linear(collected: Collected, first: str, second: str, stack: str) -> Iterator[tuple[Component, Component]]:
    """The components of two parts that act on the same linear layer; of one part each with itself."""
    for a in collected.of(first):
        for b in collected.of(second) if first != second else [a]:
            same_role = a.stack == b.stack == stack and a.family == b.family and a.shape == b.shape
            same_experts = a.experts == b.experts or bool({*(a.experts or ())} & {*(b.experts or ())})
            if same_role and same_experts and set(a.layers) & set(b.layers):
                yield a, b


def cosine(a: Component, b: Component) -> float:
    """<D_a, D_b>_F / (||D_a|| ||D_b||); NaN for zeros, for what isn't finite, and for different shapes."""
    if a.shape != b.shape or not (a.finite and b.finite):
        return float("nan")
    norms = float(np.linalg.norm(a.singular_values) * np.linalg.norm(b.singular_values))
    return inner(a.pair, b.pair) / norms if norms else float("nan")


def overlap(a: Component, b: Component, side: str = "input") -> float:
    """Mean of cos^2 over the principal angles between the row ("input") or column ("output") spaces; NaN for zeros.

    With orthonormal bases Q_a and Q_b that is ||Q_a^T Q_b||_F^2 / min(n_a, n_b).
    """
    product = between_spaces(a, b, side)
    return float(product.square().sum()) / min(product.shape) if product.numel() else float("nan")


def between_spaces(a: Component, b: Component, side: str) -> torch.Tensor:
    """Q_a^T Q_b, (n_a, n_b), of orthonormal bases of the row ("input") or column ("output") spaces.

    Without entries for zeros, for what isn't finite, and for different shapes.
    """
    if a.shape != b.shape or not (a.finite and b.finite):
        return torch.zeros(0, 0)
    first, second = (c.spaces[0 if side == "output" else 1] for c in (a, b))
    return first.T @ second


def stack_of(collected: Collected, stack: str | None) -> str:
    """The named stack, else the one with most components.

    Raises:
        ConfigError: the adapter doesn't reach a stack of that name.
    """
    if stack is None:
        count = {name: sum(c.stack == name for c in collected.components) for name in collected.layers}
        return max(count, key=lambda name: count[name])
    if stack not in collected.layers:
        raise ConfigError(
            f"{collected.source} reaches no stack {stack!r}; it reaches {', '.join(map(repr, collected.layers))}."
        )
    return stack


def _pairwise(
    collected: Collected, part: str | None, stack: str | None, measure: Callable[[Component, Component], float]
) -> np.ndarray:
    stack = stack_of(collected, stack)
    number = collected.layers[stack]
    at: dict[int, dict[str, Component]] = {}
    for component in _some(collected, part or collected.by_layer):
        if component.stack == stack:
            for layer in component.layers:
                at.setdefault(layer, {})[component.role] = component
    grid = np.full((number, number), np.nan)
    for i in at:
        for j in at:
            both = at[i].keys() & at[j].keys()
            grid[i, j] = mean(measure(at[i][role], at[j][role]) for role in sorted(both))
    return grid


def _some(collected: Collected, part: str) -> list[Component]:
    components = collected.of(part)
    if not components:
        raise ConfigError(f"{collected.source} has no part {part!r}; its parts: {', '.join(collected.parts)}.")
    return components


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
