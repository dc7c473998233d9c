"""Suggestions: the allocation against a search through all, and whole probes on a tiny model."""

import json
import signal
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from typer.testing import CliRunner

from ziggurat import MSPLoraConfig
from ziggurat.analysis import collect, measures
from ziggurat.analysis.page import report
from ziggurat.analysis.trace import top_values
from ziggurat.cli import app
from ziggurat.errors import ConfigError, RecipeError
from ziggurat.plan.allocate import boundaries, by_gain, by_width, costs, energies, sensitivities
from ziggurat.plan.gradients import gradients_of
from ziggurat.plan.suggest import suggestion
from ziggurat.recipe.methods import method_config
from ziggurat.recipe.recipe import load_recipe
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.loop.run import train
from ziggurat.training.sizing.counts import count
from zoo import ZOO


def probe(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = MSPLoraConfig(ranks=[4, 4, 4], target_modules=["query", "value"], init_weights=False, **fields)
    return get_peft_model(ZOO["bert"].build(), config)


def test_a_rank_costs_what_the_adapter_grows_by() -> None:
    def parameters(ranks: list[int]) -> int:
        config = MSPLoraConfig(ranks=ranks, target_modules=["query", "value"])
        model = get_peft_model(ZOO["bert"].build(), config)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    actual = costs(collect(probe()))
    for tier, (name, cost) in enumerate(actual.items()):
        more = [4 + (n == tier) for n in range(3)]
        assert parameters(more) - parameters([4, 4, 4]) == cost, name


def test_energies_count_every_linear() -> None:
    collected = collect(probe())
    energy_by_part = energies(collected)
    for part in ("global", "mid", "layer"):
        expected = sum(len(c.layers) * c.singular_values**2 for c in collected.of(part))
        np.testing.assert_allclose(energy_by_part[part], expected)


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=3, max_size=3),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.integers(15, 60),
)
def test_greed_stays_in_the_budget_and_leaves_nothing_affordable(
    gains: list[list[float]], cost: list[int], budget: int
) -> None:
    tiers = ["a", "b", "c"]
    curves = {t: np.sort(g)[::-1] for t, g in zip(tiers, gains, strict=True)}
    price = dict(zip(tiers, cost, strict=True))
    ranks = by_gain(curves, price, budget)
    spent = sum(price[t] * ranks[t] for t in tiers)
    assert spent <= budget and all(1 <= r <= 4 for r in ranks.values())
    assert all(ranks[t] == 4 or spent + price[t] > budget for t in tiers)


def test_greed_is_the_best_choice_at_equal_prices() -> None:
    curves = {t: np.sort(np.random.default_rng(n).random(4))[::-1] for n, t in enumerate("abc")}
    ranks = by_gain(curves, dict.fromkeys("abc", 2), 14)
    worth = {r: sum(curves[t][:k].sum() for t, k in zip("abc", r, strict=True)) for r in product(range(1, 5), repeat=3)}
    assert tuple(ranks.values()) == max((r for r in worth if sum(r) <= 7), key=lambda r: worth[r])


def test_widths_are_kept_in_proportion() -> None:
    ranks = by_width({"a": 8.0, "b": 4.0, "c": 2.0}, dict.fromkeys("abc", 1), 28, most=32)
    assert ranks == {"a": 16, "b": 8, "c": 4}


@given(st.lists(st.floats(0, 1), min_size=5, max_size=8), st.integers(1, 3), st.integers(1, 2))
def test_boundaries_are_the_best_of_all(distance: list[float], groups: int, shortest: int) -> None:
    layers = len(distance) + 1
    if groups * shortest > layers:
        with pytest.raises(ConfigError, match="but there are"):
            boundaries(distance, groups, shortest)
        return
    actual = boundaries(distance, groups, shortest)
    allowed = [
        [0, *cut]
        for cut in combinations(range(1, layers), groups - 1)
        if all(b - a >= shortest for a, b in zip([0, *cut], [*cut, layers], strict=True))
    ]
    assert actual in allowed

    def worth(starts: list[int]) -> float:
        return sum(distance[s - 1] for s in starts[1:])

    assert worth(actual) == pytest.approx(max(map(worth, allowed)))


def test_sensitivities_are_those_of_the_definition() -> None:
    model = probe().train()
    inputs = ZOO["bert"].inputs()
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    actual = sensitivities(model)
    pairs = {n.rsplit(":", 1)[0]: p for n, p in model.named_parameters() if n.endswith(":A_global")}
    expected = np.zeros(4)
    for name, A in pairs.items():
        B = dict(model.named_parameters())[f"{name}:B_global"]
        score = (A * A.grad).abs().mean(1) + (B * B.grad).abs().mean(0)
        expected += np.sort(score.detach().numpy())[::-1]
    np.testing.assert_allclose(actual["global"], expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["energy", "effective_rank", "stable_rank"])
def test_a_suggestion_can_be_trained_and_has_the_size_it_says(criterion: str) -> None:
    suggested = suggestion(collect(probe()), 2000, criterion, groups=2)
    assert suggested.spent <= 2000
    config = MSPLoraConfig(
        ranks=list(suggested.ranks.values()), group_starts=suggested.group_starts, target_modules=["query", "value"]
    )
    model = get_peft_model(ZOO["bert"].build(), config)
    built = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The probe had three mid groups and the suggestion has two: one mid pair a role less.
    assert built == suggested.spent - 2 * 32 * suggested.ranks["mid"]


def test_bad_probes_are_refused() -> None:
    with pytest.raises(ConfigError, match="a probe is one of msplora"):
        lora = get_peft_model(ZOO["bert"].build(), LoraConfig(r=2, target_modules=["query"]))
        suggestion(collect(lora), 1000)
    fresh = get_peft_model(ZOO["bert"].build(), MSPLoraConfig(ranks=[4, 4, 4], target_modules=["query"]))
    with pytest.raises(ConfigError, match="nothing but zeros or NaN"):
        suggestion(collect(fresh), 1000)
    trained = collect(probe())
    with pytest.raises(ConfigError, match="one rank for each tier takes"):
        suggestion(trained, 10)
    with pytest.raises(ConfigError, match="needs the gradients of a probe run"):
        suggestion(trained, 2000, "sensitivity")
    with pytest.raises(ConfigError, match="criterion 'luck': one of energy"):
        suggestion(trained, 2000, "luck")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "story"]
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(str(folder))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(str(folder))
    return folder


def written(tiny: Path, folder: Path) -> Path:
    lines = ["text,label", *(f"{'good' if n % 2 else 'bad'} film,{n % 2}" for n in range(24))]
    (folder / "data.csv").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(
        f"model: {tiny}\ndata.train: {folder / 'data.csv'}\nmethod.name: msplora\nmethod.r: 4\n"
        "method.target_modules: [query, value]\ntrain.lr: 1.0e-2\ntrain.batch: 4\n"
    )
    return folder / "recipe.yaml"


def test_a_recipe_asks_for_spectra_and_the_report_draws_them(tiny: Path, tmp_path: Path) -> None:
    words = ["spectra=epoch", "train.epochs=2", "train.save=never", f"output={tmp_path / 'run'}"]
    train(load_recipe(written(tiny, tmp_path), words))
    epochs, values = top_values(json.loads((tmp_path / "run" / "run.json").read_text())["history"])["layer"]
    assert list(epochs) == [1, 2] and values.shape == (1, 2)
    expected = measures.mean_spectrum(collect(tmp_path / "run"), "layer", top=1)
    np.testing.assert_allclose(values[:, -1], expected, rtol=1e-5)
    assert "Singular values of part layer" in report([tmp_path / "run"])


@pytest.mark.parametrize("criterion", ["energy", "sensitivity"])
def test_the_command_probes_and_writes_a_recipe(criterion: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "suggested.yaml"
    arguments = ["suggest", str(written(tiny, tmp_path)), "--out", str(out), "--probe-rank", "4", "--probe-steps", "4"]
    done = CliRunner().invoke(app, [*arguments, "--criterion", criterion])
    assert done.exit_code == 0, (done.output, done.exception)
    recipe = load_recipe(out)
    # r 4 gives ranks 4, 2, 1: (4 + 3 x 2 + 6 x 1) x 32 x 2 roles.
    assert "of 1,024 parameters" in done.output
    whole, mid, layer = recipe.method["ranks"]
    assert (whole + 3 * mid + 6 * layer) * 64 <= 1024
    assert len(recipe.method["group_starts"]) == 3 and recipe.method["group_starts"][0] == 0
    assert recipe.train.max_steps is None and recipe.train.lr == 1e-2 and "lora_alpha" not in recipe.method
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists already" in again.output


@pytest.mark.parametrize("criterion", ["energy", "sensitivity", "stable_rank"])
def test_roles_get_ranks_of_their_own(criterion: str, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "suggested.yaml"
    words = ["method.target_modules=[query, value, output.dense]", "--budget", "3000", "--by-role"]  # d_in 16 and 32
    arguments = ["suggest", str(written(tiny, tmp_path)), *words, "--out", str(out), "--criterion", criterion]
    done = CliRunner().invoke(app, [*arguments, "--probe-rank", "8", "--probe-steps", "4"])
    assert done.exit_code == 0, (done.output, done.exception)
    method = load_recipe(out).method
    assert len(method["rank_pattern"]) == 4 and len(set(map(tuple, method["rank_pattern"].values()))) > 1
    config, model = method_config(method), BertForSequenceClassification(BertConfig.from_pretrained(str(tiny)))
    spent = count(model, config)
    assert f"{spent:,} of 3,000 parameters" in done.output and 2000 < spent <= 3000


def test_even_scales_stay_what_they_were(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "suggested.yaml"
    words = ["method.even_scales=true", "method.lora_alpha=12", "--budget", "640"]  # pays ranks 1, 1, 1
    arguments = ["suggest", str(written(tiny, tmp_path)), *words, "--out", str(out), "--criterion", "stable_rank"]
    done = CliRunner().invoke(app, [*arguments, "--probe-rank", "4", "--probe-steps", "4"])
    assert done.exit_code == 0, (done.output, done.exception)
    method = load_recipe(out).method
    assert method["ranks"] == [1, 1, 1]
    scales = [tier.scale for tier in method_config(method).pyramid()]
    assert scales == pytest.approx([12 / 4] * 3)


def test_what_is_wrong_is_said_before_the_probe(tiny: Path, tmp_path: Path) -> None:
    """The data are gone: a probe would end otherwise."""
    recipe = written(tiny, tmp_path)
    (tmp_path / "data.csv").unlink()
    for more, message in (
        (["--criterion", "luck"], "criterion 'luck': one of energy"),
        (["--budget", "many"], "a share of the model's"),
        (["--budget", "500"], "500 parameters, but one rank for each tier takes 640"),
        (["method.r=", "method.budget=500"], "500 parameters, but one rank for each tier takes 640"),
    ):
        done = CliRunner().invoke(app, ["suggest", str(recipe), *more, "--out", str(tmp_path / "s.yaml")])
        assert isinstance(done.exception, ConfigError) and message in str(done.exception), done.exception
    gradients = ["suggest", str(recipe), "--criterion", "gradients", "--probe-steps", "2"]
    done = CliRunner().invoke(app, gradients)
    assert done.exit_code == 2 and "--probe-steps: --criterion gradients runs no probe" in done.output


def test_a_probe_that_is_stopped_ends_as_a_run_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **more: Any) -> Any:
        raise Interrupted("probe", "checkpoint-1", 1, 40, signal.SIGINT)

    monkeypatch.setattr("ziggurat.training.loop.run.train", stopped)
    done = CliRunner().invoke(app, ["suggest", str(written(tiny, tmp_path)), "--out", str(tmp_path / "s.yaml")])
    assert done.exit_code == 130 and "The probe was stopped at step 1 of 40; no recipe is written." in done.output
    assert not (tmp_path / "s.yaml").exists()


def test_rewards_have_no_gradients_before_training(tmp_path: Path) -> None:
    values = {"task": "grpo", "model": "m", "data.train": "a.csv", "rewards.functions": ["json"]}
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump({**values, "method.name": "msplora", "method.r": 8}))
    with pytest.raises(RecipeError, match=r"task: grpo learns from rewards .* no gradients before"):
        gradients_of(path)


def test_a_recipes_budget_is_the_budget_and_tiers_that_give_way_are_named(tiny: Path, tmp_path: Path) -> None:
    recipe = written(tiny, tmp_path)
    probe = ["--probe-rank", "4", "--probe-steps", "2"]
    out = tmp_path / "paid.yaml"
    done = CliRunner().invoke(
        app, ["suggest", str(recipe), "method.r=", "method.budget=900", "--out", str(out), *probe]
    )
    assert done.exit_code == 0 and "of 900 parameters" in done.output, (done.output, done.exception)
    assert "budget" not in load_recipe(out).method and len(load_recipe(out).method["ranks"]) == 3
    tiers = "method.tiers=[{name: all, groups: 1, r: 4}, {name: each, groups: layers, r: 2}]"
    out = tmp_path / "tiers.yaml"
    done = CliRunner().invoke(app, ["suggest", str(recipe), "method.r=", tiers, "--out", str(out), *probe])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "2 tiers of method.tiers give way" in done.output and "tiers" not in load_recipe(out).method
