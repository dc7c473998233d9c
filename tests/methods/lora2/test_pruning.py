"""Which directions survive, and that the dead stay dead."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from methods_table import logits
from tolerance import assert_models_agree
from ziggurat import LoRA2Config
from ziggurat.errors import ConfigError
from ziggurat.host.lifecycle import PATIENCE
from ziggurat.methods.lora2.importance import Importance, scores, smooth, survivors
from ziggurat.methods.lora2.layer import LoRA2Linear
from ziggurat.methods.lora2.pruning import adapted
from zoo import ZOO

SETTINGS: dict[str, Any] = {"r": 4, "outer_rank": 3, "target_rank": 2, "initial_warmup": 2, "final_warmup": 4}


def model_with(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoRA2Config(
        **{**SETTINGS, "mask_interval": 1, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **fields}
    )
    return get_peft_model(ZOO["roberta"].build(), config).train()


def batch() -> dict[str, Tensor]:
    return ZOO["roberta"].inputs() | {"labels": torch.tensor([0, 2])}


def loop(model: PeftModel, steps: range, total: int, optimizer: torch.optim.Optimizer | None = None) -> list[int]:
    """The budget after each step of a plain training loop."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    budgets = []
    for step in steps:
        torch.manual_seed(step)
        model(**batch()).loss.backward()
        optimizer.step()
        budgets.append(model.prune(step, total))
        optimizer.zero_grad()
    return budgets


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=6), st.integers(0, 25))
def test_exactly_the_budget_survives_and_ties_go_by_position(values: list[list[int]], budget: int) -> None:
    masks = survivors([torch.tensor(v, dtype=torch.float32) for v in values], budget)
    flat = [(value, position) for position, value in enumerate(v for row in values for v in row)]
    best = {position for _, position in sorted(flat, key=lambda pair: (-pair[0], pair[1]))[:budget]}
    assert [len(mask) for mask in masks] == [len(row) for row in values]
    assert {i for i, kept in enumerate(torch.cat(masks).tolist()) if kept} == best
    assert len(best) == min(budget, len(flat))


def test_scores_that_are_no_numbers_lose() -> None:
    (mask,) = survivors([torch.tensor([float("nan"), 0.0, 1.0])], 2)
    assert mask.tolist() == [False, True, True]


def test_importance_against_the_formulas_in_plain_python() -> None:
    beta1, beta2 = 0.7, 0.9
    draw = torch.Generator().manual_seed(0)
    r, k, mean, uncertainty = 2, 3, [[0.0] * 7 for _ in range(2)], [[0.0] * 7 for _ in range(2)]
    importance = Importance(torch.zeros(r, 1 + 2 * k, dtype=torch.float64), torch.zeros(r, 1 + 2 * k).double())
    for _ in range(4):
        sensed = torch.rand(r, 1 + 2 * k, generator=draw, dtype=torch.float64)
        importance = smooth(importance, sensed, beta1, beta2)
        for i in range(r):
            for j in range(1 + 2 * k):
                mean[i][j] = beta1 * mean[i][j] + (1 - beta1) * float(sensed[i, j])
                gap = abs(float(sensed[i, j]) - mean[i][j])
                uncertainty[i][j] = beta2 * uncertainty[i][j] + (1 - beta2) * gap
    each = [[m * u for m, u in zip(*rows, strict=True)] for rows in zip(mean, uncertainty, strict=True)]
    expected = [row[0] + sum(row[1 : 1 + k]) / k + sum(row[1 + k :]) / k for row in each]
    torch.testing.assert_close(scores(importance, k), torch.tensor(expected).double(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_with_gradients_that_are_not_finite_changes_no_average(value: float) -> None:
    """Loss scaling skips such a step for all weights, also for linear layers of other shapes, whose gradients are."""
    model = model_with(target_modules=["query", "intermediate.dense"], outer_rank=None, rank_pattern={"query": 3})
    assert len({layer.factor("default", "V").shape for layer in adapted(model, "default").values()}) > 1
    loop(model, range(1, 3), 20)
    before = {path: layer.importance["default"] for path, layer in adapted(model, "default").items()}
    model(**batch()).loss.backward()
    first, *_ = adapted(model, "default").values()
    first.factor("default", "E").grad[0] = value
    model.prune(3, 20)
    for path, layer in adapted(model, "default").items():
        assert torch.equal(layer.importance["default"].mean, before[path].mean)
        assert torch.equal(layer.importance["default"].uncertainty, before[path].uncertainty)


def test_the_mask_goes_with_its_run() -> None:
    """Neither a second run on the same model, nor other weights, nor another optimiser meets the first run's mask."""
    model = model_with(init_weights=False)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop(model, range(1, 21), 20, optimizer)
    assert sum(model.ranks().values()) == 16
    other = torch.nn.Linear(2, 2)
    step = torch.optim.SGD(other.parameters(), lr=0.1)
    model.load_state_dict(fresh)
    for stepping in (step, optimizer):
        optimizer.zero_grad()
        stepping.step()
    assert sum(model.ranks().values()) == 32
    loop(model, range(1, 3), 20)
    assert sum(model.ranks().values()) == 32


def test_another_optimiser_moves_nothing_of_a_pruned_adapter() -> None:
    model = model_with(init_weights=False)
    loop(model, range(1, 21), 20)
    first, *_ = adapted(model, "default").values()
    with torch.no_grad():
        first.factor("default", "E").fill_(1.0)
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert first.alive("default").all()


def test_the_averages_read_the_weights_and_gradients_of_each_entry() -> None:
    model = model_with()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    model.prune(1, 20)
    for layer in adapted(model, "default").values():
        E, V, v = (layer.factor("default", name) for name in "EVv")
        mean = layer.importance["default"].mean
        expected = torch.cat([(E * E.grad)[:, None], V * V.grad, (v * v.grad).T], dim=1).abs() * (1 - 0.85)
        torch.testing.assert_close(mean, expected.detach(), rtol=1e-5, atol=1e-12)


def test_the_budget_is_met_at_every_pruning() -> None:
    model = model_with()
    total, full, target = 20, 8 * 4, 8 * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, total + 1):
        (budget,) = loop(model, range(step, step + 1), total, optimizer)
        alive = sum(model.ranks().values())
        assert alive == (full if step <= 2 else budget)
        assert target <= budget <= full
    assert alive == target


def test_pruned_directions_may_return_before_the_final_phase() -> None:
    model = model_with(mask_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop(model, range(1, 12), 20, optimizer)
    first = {path: layer.alive("default") for path, layer in adapted(model, "default").items()}
    assert sum(int(mask.sum()) for mask in first.values()) < 32
    loop(model, range(12, 13), 20, optimizer)
    assert sum(model.ranks().values()) == 32


@pytest.mark.parametrize("call_before_the_step", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_the_final_mask_is_frozen_against_any_optimiser(make: type, call_before_the_step: bool) -> None:
    model, total = model_with(), 20
    arguments = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1, **arguments)
    masks = []
    for step in range(1, total + 1):
        model(**batch()).loss.backward()
        if call_before_the_step:
            model.prune(step, total)
        optimizer.step()
        if not call_before_the_step:
            model.prune(step, total)
        optimizer.zero_grad()
        if step >= 16:
            masks.append([layer.alive("default") for layer in adapted(model, "default").values()])
    assert sum(int(mask.sum()) for mask in masks[0]) == 16
    for later in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], later, strict=True))


def test_nothing_to_prune_is_no_error() -> None:
    model = model_with(target_rank=4)
    assert loop(model, range(1, 21), 20) == [32] * 20
    assert set(model.ranks().values()) == {4}
    rank_one = model_with(r=1, outer_rank=1, target_rank=None)
    assert loop(rank_one, range(1, 11), 10) == [8] * 10


def test_a_mask_can_be_final_without_any_pruning_before() -> None:
    model = model_with(mask_interval=100)
    loop(model, range(1, 21), 20)
    assert sum(model.ranks().values()) == 16


def test_all_directions_equal() -> None:
    model = model_with()
    with torch.no_grad():
        for layer in adapted(model, "default").values():
            for factor in layer.stored("default").values():
                factor.fill_(0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    model.prune(16, 20)
    assert list(model.ranks().values()) == [4, 4, 4, 4, 0, 0, 0, 0]


def test_calls_that_make_no_sense() -> None:
    model = model_with()
    with pytest.raises(ConfigError, match="steps are counted from 1"):
        model.prune(0, 20)
    with pytest.raises(ConfigError, match="the last one is total"):
        model.prune(21, 20)
    with pytest.raises(ConfigError, match="take 2 \\+ 4 steps, but the run has 6"):
        model.prune(1, 6)
    with pytest.raises(ConfigError, match=r"before optimizer\.zero_grad"):
        model.prune(1, 20)
    with pytest.raises(ConfigError, match="no linear layer has a LoRA² adapter 'other'"):
        model.prune(1, 20, adapter="other")


def test_a_loop_that_never_prunes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.lin(x).sum()}

    model = get_peft_model(Loss(), LoRA2Config(target_modules=["lin"]))
    for _ in range(PATIENCE + 5):
        model(torch.ones(1, 4))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "adapter 'default' of LoRA² stays as it is" in caplog.text


def test_a_plain_loop_resumes_bitwise(tmp_path: Path) -> None:
    whole = model_with()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, weight_decay=0.1)
    loop(whole, range(1, 12), 20, optimizer)
    resumed = model_with()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    second = torch.optim.AdamW(resumed.parameters(), lr=1e-2, weight_decay=0.1)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_pruning_state(whole.pruning_state())
    loop(whole, range(12, 21), 20, optimizer)
    loop(resumed, range(12, 21), 20, second)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = model_with(r=3)
    with pytest.raises(ConfigError, match="saved from another model or config"):
        other.load_pruning_state(whole.pruning_state())


@pytest.mark.parametrize("target_rank", [1, 2])
def test_compact_is_smaller_and_the_same(target_rank: int, tmp_path: Path) -> None:
    model = model_with(target_rank=target_rank, lora_alpha=64)
    loop(model, range(1, 21), 20)
    model.eval()
    inputs = ZOO["roberta"].inputs()
    expected, before = logits(model, inputs), sum(p.numel() for p in model.parameters())
    ranks = model.ranks()
    assert model.compact() == ranks == model.peft_config["default"].rank_pattern
    assert sum(p.numel() for p in model.parameters()) < before
    assert_models_agree(logits(model, inputs), expected)
    expected = logits(model, inputs)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(ZOO["roberta"].build(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    assert loaded.ranks() == ranks
    assert_models_agree(logits(loaded.merge_and_unload(), inputs), expected)


def test_a_linear_that_lost_all_directions_costs_nothing(tmp_path: Path) -> None:
    model = model_with(init_weights=False)
    first, *_ = adapted(model, "default").values()
    with torch.no_grad():
        first.factor("default", "E").zero_()
    model.eval()
    expected = logits(model, ZOO["roberta"].inputs())
    assert next(iter(model.compact().values())) == 0
    assert sum(factor.numel() for factor in first.stored("default").values()) == 0
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(ZOO["roberta"].build(), str(tmp_path)).eval()
    assert_models_agree(logits(loaded, ZOO["roberta"].inputs()), expected)
    loaded.train()
    for parameter in loaded.parameters():
        parameter.requires_grad_("lora2_" in str(parameter) or parameter.requires_grad)
    merged = loaded.eval().merge_and_unload()
    assert_models_agree(logits(merged, ZOO["roberta"].inputs()), expected)


def test_a_compacted_adapter_trains_on() -> None:
    model = model_with(init_weights=False)
    with torch.no_grad():
        for i, layer in enumerate(adapted(model, "default").values()):
            layer.factor("default", "E")[: i % 5] = 0
    ranks = model.compact()
    assert sorted(set(ranks.values())) == [0, 1, 2, 3, 4]
    loop(model, range(1, 21), 20)
    assert sum(model.ranks().values()) == min(16, sum(ranks.values()))
    assert all(model.ranks()[path] <= rank for path, rank in ranks.items())


def test_compact_refuses_an_untrained_adapter() -> None:
    with pytest.raises(ConfigError, match="every direction of adapter 'default' has E = 0"):
        model_with().compact()


def test_a_copy_prunes_on_its_own() -> None:
    model = model_with()
    loop(model, range(1, 17), 20)
    twin = copy.deepcopy(model)
    loop(twin, range(17, 21), 20)
    assert sum(twin.ranks().values()) == sum(model.ranks().values()) == 16
    assert any(isinstance(module, LoRA2Linear) for module in twin.modules())
