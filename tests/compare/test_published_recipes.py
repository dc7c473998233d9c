"""The recipes of the papers' runs: settings of the reference scripts, and adapters of the published sizes."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, DebertaV2Config, RobertaConfig

from ziggurat.recipe.recipe import load_recipe, shipped
from ziggurat.training.sizing.budget import count_of, fit_rank

LOR2C = {
    "mnli": (30, 128, 256, 5.0e-4),
    "mrpc": (30, 64, 256, 4.0e-4),
    "qnli": (30, 64, 256, 4.0e-4),
    "qqp": (30, 32, 256, 4.0e-4),
    "rte": (80, 32, 512, 4.0e-4),
    "sst2": (60, 32, 256, 5.0e-4),
    "stsb": (40, 32, 256, 4.0e-4),
    "cola": (30, 16, 256, 4.0e-4),
}
#: Task -> r, target rank, alpha, rate, epochs, length, initial and final warm-up, interval.
LORA2 = {
    "cola": (4, 3, 32, 8.0e-4, 25, 64, 800, 3500, 10),
    "mnli": (8, 3, 16, 5.0e-4, 7, 256, 8000, 50000, 100),
    "mrpc": (8, 1, 32, 1.0e-3, 30, 320, 600, 1800, 1),
    "qnli": (8, 2, 32, 1.2e-3, 5, 512, 2000, 8000, 100),
    "qqp": (8, 3, 16, 8.0e-4, 20, 320, 8000, 25000, 100),
    "rte": (4, 3, 32, 1.2e-3, 50, 320, 600, 1800, 1),
    "sst2": (8, 2, 16, 8.0e-4, 24, 128, 6000, 22000, 100),
    "stsb": (4, 1, 32, 2.2e-3, 25, 128, 800, 2000, 10),
}


def meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture(scope="module")
def roberta() -> nn.Module:
    return meta(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))


@pytest.fixture(scope="module")
def deberta() -> nn.Module:
    return meta(DebertaV2Config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072))


@pytest.mark.parametrize("task", LOR2C)
def test_lor2c(task: str) -> None:
    recipe = load_recipe(f"lor2c-roberta-{task}")
    train = recipe.train
    assert (train.epochs, train.batch, recipe.data.max_length, train.lr) == LOR2C[task]
    assert recipe.head.lr == pytest.approx(train.lr / 2) and recipe.data.train == f"glue/{task}" and recipe.seed == 17


@pytest.mark.parametrize("task", LORA2)
def test_lora2(task: str) -> None:
    recipe = load_recipe(f"lora2-deberta-{task}")
    m, train = recipe.method, recipe.train
    actual = (m["r"], m["target_rank"], m["lora_alpha"], train.lr, train.epochs, recipe.data.max_length)
    assert (*actual, m["initial_warmup"], m["final_warmup"], m["mask_interval"]) == LORA2[task]
    assert m["outer_rank"] == 8


def test_the_adapters_have_the_published_sizes(roberta: nn.Module, deberta: nn.Module) -> None:
    def size(model: nn.Module, recipe: str, *words: str) -> int | None:
        return count_of(model, load_recipe(recipe, words).method, refuse=True)

    assert size(roberta, "roberta-mrpc") == 135_168
    assert size(roberta, "roberta-mrpc", "method.name=lora", "method.num_groups=") == 294_912
    assert size(roberta, "lor2c-roberta-mrpc") == 147_456
    assert size(roberta, "lor2c-roberta-mrpc", "method.share=true") == 79_872
    assert size(deberta, "lora2-deberta-mrpc") == 1_336_896
    assert size(deberta, "lora2-deberta-rte") == 1_332_000


def test_budgets_are_met_at_the_real_size(roberta: nn.Module) -> None:
    """About 0.3M, the size of the papers' baselines: LoRA's r 8, AdaLoRA's, bottlenecks of 16."""
    targets = {"target_modules": ["query", "value"]}
    assert fit_rank(roberta, {"name": "lora", **targets}, 300_000).rank == 8
    assert fit_rank(roberta, {"name": "msplora", **targets}, 135_168).rank == 8
    bottleneck = fit_rank(roberta, {"name": "adapter"}, 310_000)
    assert (bottleneck.rank, bottleneck.parameters) == (16, 12 * (2 * 16 * 768 + 16 + 768))


def test_every_paper_has_its_instruction_run() -> None:
    assert {"llama2-alpaca", "lora-llama2-alpaca", "lor2c-llama2-alpaca"} <= set(shipped())
    methods = {name: load_recipe(name).method["name"] for name in shipped() if name.endswith("llama2-alpaca")}
    assert methods == {"llama2-alpaca": "msplora", "lora-llama2-alpaca": "lora", "lor2c-llama2-alpaca": "lor2c"}
    steps = {load_recipe(name).train.batch * load_recipe(name).train.accumulate for name in methods}
    assert steps == {128}
