"""Every method of the papers' tables by name: it trains, tells its cost, reloads exactly, and meets a budget."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from training_tables import reviews, write_csv
from transformers import AutoModel, TrainerCallback

from ziggurat.errors import RecipeError
from ziggurat.recipe.methods import METHODS
from ziggurat.recipe.recipe import make_recipe
from ziggurat.recipe.schema import Recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.loop.run import train
from ziggurat.training.sizing.budget import count_of, fit_rank, recipe_model, settle_budget

D, LAYERS = 64, 4
#: Method -> fields, and its trainable parameters on query and value (d 64) of 4 layers, by its paper's formula.
PAPER: dict[str, tuple[dict[str, Any], int]] = {
    "msplora": ({"r": 4}, 2 * 2 * D * (4 + 3 * 2 + LAYERS * 1)),
    "lor2c": ({"r": 4}, 2 * LAYERS * 4 * D),
    "lora2": ({"r": 4, "outer_rank": 4}, 2 * LAYERS * (4 * 2 * D + 2 * 4 * 4 + 4)),
    "lora": ({"r": 4}, 2 * LAYERS * 4 * 2 * D),
    "dora": ({"r": 4}, 2 * LAYERS * (4 * 2 * D + D)),
    "pissa": ({"r": 4, "lora_alpha": 4}, 2 * LAYERS * 4 * 2 * D),
    "qlora": ({"r": 4}, 2 * LAYERS * 4 * 2 * D),
    "dylora": ({"r": 4}, 2 * LAYERS * 4 * 2 * D),
    "sharelora": ({"r": 4}, 2 * (4 * D + LAYERS * D * 4)),
    "tiedlora": ({"r": 4}, 2 * (4 * 2 * D + LAYERS * (4 + D))),
    "loraxs": ({"r": 4}, 2 * LAYERS * 4 * 4),
    "aslora": ({"r": 4, "groups": 2}, 2 * (4 * D + LAYERS * D * 4)),
    "adalora": ({"init_r": 6, "target_r": 4}, 2 * LAYERS * (6 * 2 * D + 6)),
    "vera": ({"r": 16}, 2 * LAYERS * (16 + D)),
    "lily": ({"r": 4, "num_B": 2, "stride_A": 2}, 2 * (2 * 4 * D + 2 * 4 * D) + 2 * LAYERS * 2 * 4),
    "adapter": ({"r": 4}, LAYERS * (4 * D + 4 + D * 4 + D)),
    "head": ({}, 0),
}


class Trained(TrainerCallback):
    """Holds on to the model that was trained."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.model = model


NO_TARGETS = {"lor2c", "adapter", "head", "bitfit", "full"}


def recipe_for(model: Path, data: Path, output: Path, name: str, **fields: Any) -> Recipe:
    targets = {} if name in NO_TARGETS else {"method.target_modules": ["query", "value"]}
    values = {
        "model": str(model),
        "data.train": str(data),
        "data.validation_rows": 8,
        "method.name": name,
        "train.lr": 1.0e-2,
        "train.batch": 8,
        "train.max_steps": 3,
        "train.evaluate": "never",
        "train.save": "never",
        "output": str(output),
        **targets,
    }
    whole = {key: value for key, value in fields.items() if "." in key or key == "resume"}
    of_method = {f"method.{key}": value for key, value in fields.items() if key not in whole}
    return make_recipe(values | whole | of_method)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_reloads_exactly(name: str, wide_bert: Path, tmp_path: Path) -> None:
    if METHODS[name].four_bits:
        pytest.importorskip("bitsandbytes")
    data = write_csv(tmp_path / "reviews.csv", reviews(24))
    fields, count = PAPER.get(name, ({}, None))
    seen = Trained()
    result = train(recipe_for(wide_bert, data, tmp_path / "out", name, **fields), callbacks=[seen])
    base = AutoModel.from_pretrained(str(wide_bert))
    if name == "bitfit":
        count = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
    if name == "full":
        count = sum(p.numel() for p in base.parameters())
    assert result.counts.adapter == count
    info = json.loads((result.folder / "run.json").read_text())
    assert info["step_seconds"] > 0 and info["peak_mb"] > 0
    assert info["stored_bytes"] == sum(file.stat().st_size for file in result.folder.glob("*.safetensors"))
    if name not in ("full", "bitfit", "head", "lily"):  # PEFT's Lily writes what it shares once a layer
        assert info["stored_bytes"] < 4 * result.counts.total + 40_000

    loaded = load_adapter_model(result.folder)
    texts = loaded.tokenizer([row["text"] for row in reviews(8)], return_tensors="pt")
    with torch.no_grad():
        expected, actual = (model.eval()(**texts).logits for model in (seen.model, loaded.model))
    # A singular value decomposition, a sum in other order, a processor's own four-bit kernel: the rest is exact.
    close = {"pissa": (1e-5, 1e-6), "adalora": (1e-5, 1e-6), "qlora": (2e-2, 2e-2)}
    tolerance = dict(zip(("rtol", "atol"), close.get(name, (0, 0)), strict=True))
    torch.testing.assert_close(actual, expected, **tolerance)


def test_adaloras_allocation_is_called_and_reaches_its_target(wide_bert: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "reviews.csv", reviews(32))
    made = recipe_for(wide_bert, data, tmp_path / "out", "adalora", init_r=6, target_r=2, **{"train.max_steps": 12})
    result = train(made)
    layers = [
        module for module in load_adapter_model(result.folder).model.modules() if isinstance(module, AdaLoraLayer)
    ]
    ranks = [int(torch.count_nonzero(layer.lora_E["default"])) for layer in layers]
    assert len(ranks) == 8 and sum(ranks) == 2 * 8
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (12, 2, 6)


def test_adalora_goes_on_where_it_was_interrupted(wide_bert: Path, tmp_path: Path) -> None:
    from ziggurat.training.callbacks.interrupt import Interrupted

    data = write_csv(tmp_path / "reviews.csv", reviews(32))
    fields: dict[str, Any] = {"init_r": 6, "target_r": 2, "train.max_steps": 8}
    whole = train(recipe_for(wide_bert, data, tmp_path / "whole", "adalora", **fields))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(recipe_for(wide_bert, data, tmp_path / "parts", "adalora", **fields), callbacks=[Stop()])
    parts = train(recipe_for(wide_bert, data, tmp_path / "parts", "adalora", **{**fields, "resume": True}))
    expected, actual = (load_adapter_model(result.folder).model.state_dict() for result in (whole, parts))
    learned = [key for key in expected if "lora_" in key or "modules_to_save" in key]
    assert len(learned) == 8 * 3 + 2
    for key in learned:
        value = expected[key]
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0)


def test_adalora_refuses_a_schedule_without_room(wide_bert: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "reviews.csv", reviews(32))
    with pytest.raises(RecipeError, match="leave none of the run's 3 to allocate"):
        train(recipe_for(wide_bert, data, tmp_path / "out", "adalora", tinit=1, tfinal=2))
    with pytest.raises(RecipeError, match="target_r must be below init_r"):
        recipe_for(wide_bert, data, tmp_path / "out", "adalora", init_r=4, target_r=4)
    with pytest.raises(RecipeError, match="'adalora' sets this itself"):
        recipe_for(wide_bert, data, tmp_path / "out", "adalora", total_step=4)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.ranks is not None])
def test_a_budget_picks_the_largest_rank_below_it(name: str, wide_bert: Path, tmp_path: Path) -> None:
    budget = 9_000
    made = recipe_for(wide_bert, tmp_path / "x.csv", tmp_path / "out", name, budget=budget)
    settled, fit = settle_budget(made)
    assert fit is not None and "budget" not in settled.method
    ranks = METHODS[name].ranks
    assert ranks is not None and settled.method.items() >= ranks(fit.rank).items()
    model = recipe_model(made)
    assert count_of(model, settled.method) == fit.parameters <= budget
    more = count_of(model, {**settled.method, **ranks(fit.rank + 1)})
    assert more is None or more > budget


def test_a_budget_that_cannot_be_met(wide_bert: Path, tmp_path: Path) -> None:
    made = recipe_for(wide_bert, tmp_path / "x.csv", tmp_path / "out", "lora", budget=100)
    with pytest.raises(RecipeError, match="100 parameters are too few for lora: rank 1 has 1,024"):
        settle_budget(made)
    with pytest.raises(RecipeError, match="bitfit has no rank"):
        recipe_for(wide_bert, tmp_path / "x.csv", tmp_path / "out", "bitfit", budget=100)
    with pytest.raises(RecipeError, match=r"method\.r: is chosen by method.budget"):
        recipe_for(wide_bert, tmp_path / "x.csv", tmp_path / "out", "lora", budget=100, r=3)
    assert fit_rank(recipe_model(made), {"name": "lora", "target_modules": ["query"]}, 1024).rank == 2


def test_bitfit_of_a_model_without_biases_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "reviews.csv", reviews(32))
    with pytest.raises(RecipeError, match="bitfit finds nothing to train"):
        train(recipe_for(tiny_llama, data, tmp_path / "out", "bitfit"))
