"""Measures against their definitions on dense matrices, in float64."""

import numpy as np
import pytest
import torch

from ziggurat.analysis import Collected, Component, measures
from ziggurat.errors import ConfigError
from ziggurat.lowrank.pair import delta


def component(seed: int, layer: int, part: str = "layer", role: str = "q", rank: int = 3) -> Component:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 6, generator=draw, dtype=torch.float64)
    return Component(part, "layers", role, (layer,), A, torch.randn(5, rank, generator=draw, dtype=torch.float64))


def collected(*components: Component, method: str = "msplora") -> Collected:
    return Collected("made up", method, components)


ADAPTER = collected(*(component(10 * n + (role == "v"), n, role=role) for n in range(3) for role in ("q", "v")))


def test_a_row_is_what_its_names_say() -> None:
    single = component(1, 0)
    dense = delta(single.pair).numpy()
    s = np.linalg.svd(dense, compute_uv=False)[:3]
    p = s / s.sum()
    expected = {
        "norm": np.linalg.norm(dense),
        "spectral_norm": s[0],
        "nuclear_norm": s.sum(),
        "m_eff": s[0] / s.sum(),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "stable_rank": (s**2).sum() / s[0] ** 2,
    }
    row = measures.row(single)
    assert row["m_eff_k"] == 1 and row["rank"] == 3 and row["parameters"] == 33
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-10), name
    assert measures.row(single, k=2)["m_eff"] == pytest.approx(s[:2].sum() / s.sum(), rel=1e-10)


def test_kl_is_the_papers_averaged_over_roles() -> None:
    matrix = measures.kl_matrix(ADAPTER)
    assert matrix.shape == (3, 3)
    shares = {(c.layers[0], c.role): c.singular_values / c.singular_values.sum() for c in ADAPTER.components}
    for i in range(3):
        for j in range(3):
            by_role = [(shares[i, role] * np.log(shares[i, role] / shares[j, role])).sum() for role in ("q", "v")]
            assert matrix[i, j] == pytest.approx(np.mean(by_role), rel=1e-8, abs=1e-10)
    np.testing.assert_allclose(np.diag(matrix), 0, atol=1e-10)


def test_the_difference_has_the_sign_of_the_figure() -> None:
    flat = collected(*(component(1, n) for n in range(3)))
    difference = measures.kl_difference(ADAPTER, flat)
    off = ~np.eye(3, dtype=bool)
    assert (difference[off] > 0).all()
    np.testing.assert_allclose(difference, measures.kl_matrix(ADAPTER), atol=1e-10)
    with pytest.raises(ConfigError, match=r"3 layers and .* 2: compare adapters of models of one depth"):
        measures.kl_difference(ADAPTER, collected(*(component(n, n) for n in range(2))))


def test_cosine_is_that_of_the_dense_updates() -> None:
    a, b = component(1, 0), component(2, 1)
    dense = [delta(c.pair).numpy() for c in (a, b)]
    expected = (dense[0] * dense[1]).sum() / (np.linalg.norm(dense[0]) * np.linalg.norm(dense[1]))
    assert measures.cosine(a, b) == pytest.approx(expected, rel=1e-10)
    matrix = measures.cosine_matrix(collected(a, b))
    np.testing.assert_allclose(matrix, [[1, expected], [expected, 1]], rtol=1e-10)


def test_overlap_sees_one_side_only() -> None:
    a = component(1, 0)
    same_input = Component("layer", "layers", "q", (1,), 2 * a.A, component(5, 1).B)
    assert measures.overlap(a, same_input, "input") == pytest.approx(1, rel=1e-10)
    assert measures.overlap(a, same_input, "output") < 0.99
    Q = [np.linalg.qr(c.B.numpy())[0] for c in (a, same_input)]
    expected = (np.linalg.svd(Q[0].T @ Q[1], compute_uv=False) ** 2).mean()
    assert measures.overlap(a, same_input, "output") == pytest.approx(expected, rel=1e-10)


def test_tiers_are_compared_where_they_meet() -> None:
    private = [component(n, n) for n in range(2)]
    twice = Component("mid", "layers", "q", (0, 1), private[0].A, private[0].B)
    grid, parts = measures.tier_overlap(collected(twice, *private))
    assert parts == ["mid", "layer"]
    expected = (1 + measures.overlap(private[0], private[1])) / 2
    np.testing.assert_allclose(grid, [[1, expected], [expected, 1]], rtol=1e-10)


def test_energy_counts_a_shared_pair_in_every_layer_it_reaches() -> None:
    mids = [
        Component("mid", "layers", "q", layers, component(n, n).A, component(n, n).B)
        for n, layers in enumerate([(0, 1, 2), (3,)])
    ]
    squares = [float(delta(c.pair).square().sum()) for c in mids]
    energy_by_part = measures.energy(collected(*mids))
    assert energy_by_part["mid"]["q"] == pytest.approx((3 * squares[0] + squares[1]) / 4, rel=1e-10)


def test_grids_name_layers_and_roles() -> None:
    grid, roles = measures.by_layer_and_role(ADAPTER, "layer", "norm")
    assert roles == ["q", "v"] and grid.shape == (3, 2)
    assert grid[2, 1] == pytest.approx(float(delta(component(21, 2, role="v").pair).norm()), rel=1e-10)


def test_the_mean_spectrum_fills_up_and_leaves_out_what_is_broken() -> None:
    good, bad = component(1, 0), component(2, 1)
    bad.A[0, 0] = float("nan")
    spectrum = measures.mean_spectrum(collected(good, bad), "layer", top=5)
    np.testing.assert_allclose(spectrum[:3], good.singular_values, rtol=1e-10)
    assert np.isnan(spectrum[3:]).all()
    broken = collected(bad)
    assert np.isnan(measures.mean_spectrum(broken, "layer")).all()
    assert np.isnan(measures.row(bad)["norm"]) and np.isnan(measures.kl_matrix(broken)).all()
    assert np.isnan(measures.cosine(good, bad)) and np.isnan(measures.overlap(good, bad))


def test_zeros_have_no_direction() -> None:
    good, zero = component(1, 0), component(2, 1)
    zero.B.zero_()
    assert np.isnan(measures.cosine(good, zero)) and np.isnan(measures.overlap(good, zero))
    assert measures.row(zero)["effective_rank"] == 0 and measures.row(zero)["m_eff"] == 0
    assert np.isnan(measures.kl_matrix(collected(good, zero))[0, 1])


def test_there_is_a_row_for_each_component() -> None:
    rows = measures.rows(ADAPTER)
    assert [row["role"] for row in rows] == ["q", "v"] * 3
    assert all(type(row["norm"]) is float for row in rows)


def test_unknown_parts_and_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="no part 'global'; its parts: layer"):
        measures.spectra(ADAPTER, "global")
    with pytest.raises(ConfigError, match="no stack 'decoder'; it reaches 'layers'"):
        measures.kl_matrix(ADAPTER, stack="decoder")
