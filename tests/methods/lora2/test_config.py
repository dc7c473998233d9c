"""Refusals of a LoRA² config, and their messages."""

from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

from plain_models import PlainList
from ziggurat import LoRA2Config
from ziggurat.errors import ConfigError
from ziggurat.methods.lora2.schedule import Schedule
from zoo import ZOO


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 4, "target_rank": 5}, "target_rank=5 with r=4: a whole number from 1 to r"),
        ({"target_rank": 0}, "target_rank=0"),
        ({"target_rank": 2.5}, r"target_rank=2\.5"),
        ({"outer_rank": 0}, "outer_rank=0: a whole number of at least 1"),
        ({"outer_rank": True}, "outer_rank=True"),
        ({"beta1": 0.0}, r"beta1=0\.0: a number above 0 and below 1"),
        ({"beta1": 1.0}, r"beta1=1\.0"),
        ({"beta2": -0.1}, r"beta2=-0\.1"),
        ({"beta2": 1}, "beta2=1"),
        ({"initial_warmup": -1}, "initial_warmup=-1: a number of optimiser steps"),
        ({"initial_warmup": 1.0}, r"initial_warmup=1\.0"),
        ({"initial_warmup": 0.5, "final_warmup": 0.5}, "take the whole run"),
        ({"mask_interval": 0}, "mask_interval=0"),
        ({"mask_interval": 0.0}, r"mask_interval=0\.0"),
        ({"orthogonality": -0.1}, r"orthogonality=-0\.1: a weight of 0 or more"),
        ({"cross_plane": float("inf")}, "cross_plane=inf"),
        ({"lora_alpha": 0}, "lora_alpha=0: a finite number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0': a layer's number"),
        ({"rank_pattern": [4]}, r"rank_pattern=\[4\]: target modules with values"),
        ({"rank_pattern": {"a": -1}}, r"rank_pattern\['a'\]=-1"),
        ({"init_weights": "pissa"}, "init_weights='pissa': True, False, 'gaussian' or 'orthonormal'"),
    ],
)
def test_bad_values_are_refused_at_once(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LoRA2Config(**fields)


def test_an_outer_rank_above_the_matrix_is_refused_before_the_model_changes() -> None:
    model = PlainList([nn.Linear(16, 16)])
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=r"outer_rank=4 is above the matrix: 'head' maps 16 to 3, so at most 3"):
        get_peft_model(model, LoRA2Config(outer_rank=4, target_modules=["blocks.0", "head"]))
    assert [name for name, _ in model.named_modules()] == names


def test_the_default_outer_rank_gives_way_to_small_matrices() -> None:
    model = get_peft_model(PlainList([nn.Linear(16, 16)]), LoRA2Config(target_modules=["blocks.0", "head"]))
    assert model.base_model.model.head.factor("default", "U").shape == (3, 16)
    assert model.base_model.model.blocks[0].factor("default", "U").shape == (8, 16)


def test_the_default_target_is_half_the_rank() -> None:
    assert [LoRA2Config(r=r).target for r in (1, 2, 5, 8)] == [1, 1, 3, 4]
    assert LoRA2Config(r=8, target_rank=8).target == 8


def test_warmups_longer_than_the_run() -> None:
    config = LoRA2Config(initial_warmup=60, final_warmup=50)
    assert config.schedule(111) == Schedule(60, 61, 10, 111)
    with pytest.raises(ConfigError, match=r"take 60 \+ 50 steps, but the run has 110"):
        config.schedule(110)
    with pytest.raises(ConfigError, match=r"take 60 \+ 50 steps"):
        LoRA2Config(initial_warmup=60, final_warmup=0.5).schedule(100)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
def test_shares_fit_every_run(total: int) -> None:
    schedule = LoRA2Config(initial_warmup=0.45, final_warmup=0.54, mask_interval=0.01).schedule(total)
    assert 0 <= schedule.initial < schedule.last <= total
    assert schedule.interval >= 1


def test_steps_and_shares_mean_the_same() -> None:
    steps = LoRA2Config(initial_warmup=20, final_warmup=50, mask_interval=5).schedule(100)
    shares = LoRA2Config(initial_warmup=0.2, final_warmup=0.5, mask_interval=0.05).schedule(100)
    assert steps == shares


def test_the_budget_falls_cubically() -> None:
    schedule = Schedule(initial=20, last=60, interval=5, total=100)
    assert [schedule.budget(step, 80, 16) for step in (1, 20, 30, 40, 50, 60, 61, 100)] == [
        80,
        80,
        16 + 27,
        16 + 8,
        16 + 1,
        16,
        16,
        16,
    ]
    assert [step for step in range(1, 101) if schedule.prunes(step)] == [25, 30, 35, 40, 45, 50, 55]
    assert [schedule.phase(step) for step in (20, 21, 59, 60)] == ["warm", "shrink", "shrink", "final"]


def test_ranks_by_path_and_by_the_end_of_a_path() -> None:
    config = LoRA2Config(r=8, rank_pattern={"layer.0.query": 3, "query": 5, "layer.1.value": 0})
    assert config.rank_at("bert.layer.0.query") == 3
    assert config.rank_at("bert.layer.1.query") == 5
    assert config.rank_at("bert.layer.1.value") == 0
    assert config.rank_at("bert.layer.11.value") == 8


def test_unknown_targets_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="Nearest names in this model: query"):
        get_peft_model(ZOO["roberta"].build(), LoRA2Config(target_modules=["querry"]))
