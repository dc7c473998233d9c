"""LoRA²'s update, regulariser and counts against the formulas, written out naively."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import RankAllocator
from torch import nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from ziggurat import LoRA2Config
from ziggurat.methods.lora2.importance import entries
from ziggurat.methods.lora2.layer import LoRA2Linear
from ziggurat.methods.lora2.orthogonality import Planes, cross_plane, orthogonality
from ziggurat.methods.lora2.pruning import adapted

EXACT = {"rtol": 1e-10, "atol": 1e-10}
TARGETS = ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"]


def one_linear(**fields: object) -> tuple[PeftModel, LoRA2Linear]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(7, 5, dtype=torch.float64))
    config = LoRA2Config(target_modules=["lin"], init_weights=False, **fields)  # type: ignore[arg-type]
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = adapted.base_model.model.lin
    assert isinstance(layer, LoRA2Linear)
    return adapted.double(), layer


def random_planes(d_in: int, d_out: int, k: int, r: int, seed: int = 0) -> Planes:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((k, d_in), (r, k), (k, r), (d_out, k))
    return Planes(*(torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes))


@pytest.mark.parametrize(("k", "r"), [(5, 3), (3, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_update_is_the_paper_s(k: int, r: int, use_rslora: bool) -> None:
    adapted, layer = one_linear(r=r, outer_rank=k, lora_alpha=6, use_rslora=use_rslora)
    U, V, E, v, u = (layer.factor("default", name) for name in "UVEvu")
    assert [tuple(t.shape) for t in (U, V, E, v, u)] == [(k, 7), (r, k), (r,), (k, r), (5, k)]
    scale = 6 / r**0.5 if use_rslora else 6 / r
    dense = scale * (u @ v) @ torch.diag(E) @ (V @ U)
    torch.testing.assert_close(layer.get_delta_weight("default"), dense, **EXACT)
    assert layer.effective_pair("default").A.shape == (k, 7)
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias
    expected = x @ (weight + dense).T + bias
    torch.testing.assert_close(adapted(x), expected, **EXACT)
    adapted.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight + dense, **EXACT)
    torch.testing.assert_close(adapted(x), expected, **EXACT)
    adapted.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight, **EXACT)
    torch.testing.assert_close(adapted(x), expected, **EXACT)


def test_a_fresh_adapter_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(400, 300)), LoRA2Config(target_modules=["0"], r=8, outer_rank=16))
    layer = model.base_model.model[0]
    assert torch.equal(layer.factor("default", "E"), torch.zeros(8))
    for name in "UVvu":
        factor = layer.factor("default", name).detach()
        assert abs(float(factor.std()) / 0.02 - 1) < 4 / factor.numel() ** 0.5
        assert abs(float(factor.mean())) < 4 * 0.02 / factor.numel() ** 0.5


@pytest.mark.parametrize("fields", [{}, {"r": 4, "outer_rank": 6}, {"r": 6, "outer_rank": 4}, {"use_rslora": True}])
def test_an_orthonormal_start_changes_nothing_and_learns_as_fast_as_lora(fields: dict[str, Any]) -> None:
    """The paper's own start is still near zero after as many steps, at the same rate."""
    size: dict[str, float] = {}
    for init in ("orthonormal", "gaussian"):
        torch.manual_seed(0)
        base = nn.Linear(40, 30, bias=False)
        config = LoRA2Config(target_modules=["0"], init_weights=init, target_rank=1, **fields)
        model = get_peft_model(nn.Sequential(base), config)
        layer = model.base_model.model[0]
        assert torch.equal(layer.get_delta_weight("default"), torch.zeros(30, 40))
        x = torch.randn(64, 40)
        assert torch.equal(model(x), x @ base.weight.T)
        if init == "orthonormal":
            U, V, v, _ = layer.planes("default")
            for factor in (U, V, v):
                wide = factor if factor.shape[0] <= factor.shape[1] else factor.T
                torch.testing.assert_close(wide @ wide.T, torch.eye(len(wide)))
            assert layer.alive("default").all()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - x[:, :30]).square().mean().backward()
            optimizer.step()
        size[init] = float(layer.get_delta_weight("default").detach().norm())
    assert size["orthonormal"] > 0.03
    assert size["gaussian"] < 1e-3 * size["orthonormal"]


def test_gradients_of_the_update_reach_every_factor() -> None:
    adapted, layer = one_linear(r=3, outer_rank=2)
    x = torch.randn(4, 7, dtype=torch.float64)
    adapted(x).square().sum().backward()
    U, V, E, v, u = (layer.factor("default", name) for name in "UVEvu")
    copies = [t.detach().clone().requires_grad_() for t in (U, V, E, v, u)]
    cU, cV, cE, cv, cu = copies
    weight = layer.base_layer.weight + 16 / 3 * (cu @ cv) @ torch.diag(cE) @ (cV @ cU)
    (x @ weight.T + layer.base_layer.bias).square().sum().backward()
    for fast, naive in zip((U, V, E, v, u), copies, strict=True):
        torch.testing.assert_close(fast.grad, naive.grad, **EXACT)


def naive_deviation(linears: list[Planes]) -> torch.Tensor:
    norms = []
    for factor in (factor for planes in linears for factor in planes):
        rows, columns = factor.shape
        gram = factor @ factor.T if rows <= columns else factor.T @ factor
        norms.append(((gram - torch.eye(min(rows, columns), dtype=torch.float64)) ** 2).sum().sqrt())
    return torch.stack(norms).mean()


@pytest.mark.parametrize(("k", "r"), [(4, 2), (3, 3), (2, 4)])
def test_the_regulariser_and_its_gradient_for_every_factor(k: int, r: int) -> None:
    linears = [random_planes(9, 6, k, r, 1), random_planes(5, 11, k, r, 2), random_planes(9, 6, k, r, 3)]
    value = orthogonality(linears)
    torch.testing.assert_close(value, naive_deviation(linears), **EXACT)
    factors = [factor for planes in linears for factor in planes]
    gradients = torch.autograd.grad(value, factors)
    naive = torch.autograd.grad(naive_deviation(linears), factors)
    for a, b in zip(gradients, naive, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(("k", "r"), [(4, 2), (3, 3), (2, 4)])
def test_the_regulariser_can_reach_zero(k: int, r: int) -> None:
    planes = Planes(*(torch.nn.init.orthogonal_(factor.detach().clone()) for factor in random_planes(9, 6, k, r)))
    for factor in planes:
        factor.requires_grad_()
    value = orthogonality([planes])
    assert float(value.detach()) < 1e-14
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, list(planes)))


def test_the_cross_plane_penalty_is_the_norm_of_the_update_with_E_one() -> None:
    linears = [random_planes(9, 6, 4, 3, 1), random_planes(5, 11, 2, 3, 2)]
    naive = torch.stack([torch.linalg.matrix_norm((U.T @ V.T) @ (v.T @ u.T)) for U, V, v, u in linears]).mean()
    value = cross_plane(linears)
    torch.testing.assert_close(value, naive, **EXACT)
    factors = [factor for planes in linears for factor in planes]
    for a, b in zip(torch.autograd.grad(value, factors), torch.autograd.grad(naive, factors), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    nothing = Planes(*(torch.zeros_like(f).detach().requires_grad_() for f in linears[0]))
    zero = cross_plane([nothing])
    assert float(zero.detach()) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(zero, list(nothing)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 9), st.integers(5, 9), st.integers(0, 10**6))
def test_the_regulariser_does_not_depend_on_the_order(k: int, r: int, d_in: int, d_out: int, seed: int) -> None:
    linears = [random_planes(d_in, d_out, k, r, seed), random_planes(d_out, d_in, r, k, seed + 1)]
    torch.testing.assert_close(orthogonality(linears), orthogonality(linears[::-1]), **EXACT)
    torch.testing.assert_close(orthogonality(linears), naive_deviation(linears), **EXACT)


def deberta(config: object) -> PeftModel:
    """DeBERTaV3-base's shape, without memory."""
    shape = DebertaV2Config(hidden_size=768, num_hidden_layers=12, intermediate_size=3072, vocab_size=128100)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(shape)
        return get_peft_model(model, config)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "r", "count"), [(8, 8, 1_336_896), (8, 4, 1_332_000), (1, 1, 166_104)])
def test_parameter_counts_on_debertav3_base(k: int, r: int, count: int) -> None:
    model = deberta(LoRA2Config(r=r, outer_rank=k, target_modules=TARGETS))
    assert model.get_nb_trainable_parameters()[0] == count
    if r == 8:
        # The abstract's 0.72 % of the model, and (below) its 0.17M.
        base = sum(p.numel() for n, p in model.named_parameters() if "lora2_" not in n)
        assert (round(base / 1e6), round(100 * count / base, 2)) == (184, 0.72)
    if r == 1:
        assert round(count / 1e6, 2) == 0.17


def test_sensitivities_fall_by_more_than_the_paper_says() -> None:
    lora2 = deberta(LoRA2Config(r=8, outer_rank=8, target_modules=TARGETS))
    layers = adapted(lora2, "default").values()
    ours = sum(entries(*(layer.factor("default", key) for key in "EVv")).numel() for layer in layers)
    adalora = deberta(AdaLoraConfig(init_r=8, target_r=8, target_modules=TARGETS, total_step=10))
    for parameter in adalora.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    allocator = RankAllocator(adalora, adalora.peft_config["default"], "default")
    allocator.update_ipt(adalora)
    theirs = sum(entry.numel() for entry in allocator.ipt.values())
    assert (ours, theirs) == (9_792, 1_327_680)
    assert round(100 * (1 - ours / theirs), 2) == 99.26
