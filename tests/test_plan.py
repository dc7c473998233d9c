"""Plans against the real thing: built models, written files, tensors that autograd keeps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LilyConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, LlamaConfig, RobertaConfig
from typer.testing import CliRunner

from methods_table import METHODS
from ziggurat import AdapterDropConfig, DyLoRAConfig, LoR2CConfig, LoRA2Config, MSPLoraConfig, add_tenants
from ziggurat.cli import app
from ziggurat.errors import ConfigError, RecipeError
from ziggurat.plan import Plan, bare_model, plan, plan_recipe
from ziggurat.plan.memory import saved_bytes
from ziggurat.plan.planner import BESIDE
from ziggurat.recipe.methods import METHODS as RECIPE_METHODS
from ziggurat.recipe.methods import method_config
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.sizing.budget import Fit, count_of, fit_rank, largest_rank, rank_fields, read_budget
from ziggurat.training.sizing.counts import count
from zoo import ZOO

ARCHITECTURES = ["bert", "gpt2", "llama", "t5", "swin", "mixtral", "modernbert"]


def config_folder(folder: Path, config: Any, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(str(folder))
    return folder


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """RoBERTa-base's config, no weights."""
    return config_folder(
        tmp_path / "roberta",
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        "RobertaForMaskedLM",
    )


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=32000,
        dtype="bfloat16",
    )
    return config_folder(tmp_path / "llama", config, "LlamaForCausalLM")


def trained(model: Any) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)


def configs(name: str) -> dict[str, Any]:
    targets = ZOO[name].targets
    return {
        "msplora": MSPLoraConfig(r=4, target_modules=targets),
        "groups": MSPLoraConfig(ranks=[3, 2, 1], target_modules=targets, num_groups=2),
        "lora": LoraConfig(r=3, target_modules=targets),
        "pattern": LoraConfig(r=3, target_modules=targets, rank_pattern={targets[0]: 2}),
        "dora": LoraConfig(r=3, target_modules=targets, use_dora=True),
        "dylora": DyLoRAConfig(r=3, target_modules=targets),
        "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=targets),
        "vera": VeraConfig(r=3, target_modules=targets),
        "lily": LilyConfig(r=3, target_modules=targets, stride_A=3, num_B=4),
        "bottlenecks": AdapterDropConfig(r=3, target_modules=targets, drop_layers=1),
        "lora2": LoRA2Config(r=3, outer_rank=5, target_modules=targets),
        "lor2c": LoR2CConfig(r=4),
        "share": LoR2CConfig(r=4, share=True),
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", configs("bert"))
def test_the_formulas_count_what_peft_builds(name: str, method: str) -> None:
    if name == "swin" and method == "share":
        pytest.skip("one A of one width for stages of several widths is refused by the method")
    config = configs(name)[method]
    try:
        model = get_peft_model(ZOO[name].build(), config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"PEFT refuses it: {error}")
    assert count(ZOO[name].build(), config) == trained(model)


def test_lora_injected_into_layers_is_counted() -> None:
    config = LoR2CConfig(r=4, injections=1, spans=[[0, 1], [2, 2], [3, 3]])
    assert count(ZOO["bert"].build(), config) == trained(get_peft_model(ZOO["bert"].build(), config))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"name": "msplora", "r": 8}, 135_168),
        ({"name": "lora", "r": 8, "target_modules": ["query", "value"]}, 294_912),
        ({"name": "lor2c", "r": 8}, 147_456),
        ({"name": "sharelora", "r": 8}, 2 * 8 * 768 * (1 + 12)),
        ({"name": "tiedlora", "r": 8}, 2 * (2 * 8 * 768 + 12 * (8 + 768))),
        ({"name": "loraxs", "r": 8}, 24 * 8**2),
        ({"name": "aslora", "r": 8}, 2 * 8 * 768 * (1 + 12)),
        ({"name": "lor2c", "r": 8, "share": True}, 79_872),
    ],
)
def test_the_papers_counts(config: dict[str, Any], parameters: int, roberta: Path) -> None:
    assert plan_recipe(roberta, choice=config, measure_memory=False).adapter == parameters


@pytest.mark.parametrize("method", ["msplora", "lora2", "lor2c", "sharelora", "tiedlora", "loraxs", "aslora"])
def test_a_plan_is_the_adapter_that_is_then_written(method: str, tmp_path: Path) -> None:
    zoo = ZOO["bert"]
    config = METHODS[method].config(zoo, modules_to_save=["classifier"])
    with torch.device("meta"):
        bare = zoo.build()
    before = {name: p.requires_grad for name, p in bare.named_parameters()}
    planned = plan(bare, config, method=method, measure_memory=False)
    assert {name: p.requires_grad for name, p in bare.named_parameters()} == before
    model = get_peft_model(zoo.build(), METHODS[method].config(zoo, modules_to_save=["classifier"]))
    model.save_pretrained(str(tmp_path))
    assert planned.file == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert planned.adapter == trained(model) == sum(part.parameters for part in planned.parts)
    assert planned.head == 3 * 16 + 3
    assert sorted(planned.modules) == sorted(model.targeted_module_names)


@pytest.mark.parametrize("method", ["msplora", "tiedlora"])
def test_a_set_is_counted_as_it_is_written(method: str, tmp_path: Path) -> None:
    zoo = ZOO["bert"]
    fields = {"modules_to_save": ["classifier"]}
    with torch.device("meta"):
        bare = zoo.build()
    planned = plan(bare, METHODS[method].config(zoo, **fields), method=method, measure_memory=False, tenants=3).tenants
    assert planned is not None
    get_peft_model(zoo.build(), METHODS[method].config(zoo, **fields)).save_pretrained(tmp_path / "one")
    sizes = add_tenants(tmp_path / "set", {"one": tmp_path / "one"})
    assert (planned.bank, planned.each) == (sizes["bank.safetensors"], sizes["one"])
    assert planned.alone == (tmp_path / "one" / "adapter_model.safetensors").stat().st_size
    config = METHODS[method].config(zoo, **fields, from_adapter=str(tmp_path / "one"))
    build_on = plan(bare, config, method=method, measure_memory=False)
    assert build_on.adapter + build_on.head == planned.private
    assert build_on.adapter == sum(part.parameters for part in build_on.parts)
    with pytest.raises(ConfigError, match="linear layers share none"):
        plan(bare, METHODS["dylora"].config(zoo), method="dylora", measure_memory=False, tenants=3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoRA2Config(r=4, outer_rank=4), "the method shares nothing between layers"),
        (LoraConfig(r=4, use_dora=True), "the method shares nothing between layers"),
        (MSPLoraConfig(ranks=[4, 4, 4]), "in this model too few layers share"),
    ],
)
def test_why_it_is_larger_than_lora(config: Any, reason: str) -> None:
    config.target_modules = {"query", "value"}
    with torch.device("meta"):
        bare = ZOO["bert"].build()
    notes = plan(bare, config, measure_memory=False).notes
    assert any(note.startswith("larger than LoRA r 4 on") and note.endswith(reason) for note in notes), notes


def test_parts_say_who_shares() -> None:
    with torch.device("meta"):
        bare = ZOO["bert"].build()
    parts = plan(bare, MSPLoraConfig(r=4, target_modules=["query"]), measure_memory=False).parts
    assert [(p.part, p.pairs, p.rank, p.shared_by, p.parameters) for p in parts] == [
        ("global", 1, 4, 4, 128),
        ("mid", 3, 2, 2, 192),
        ("layer", 4, 1, 1, 128),
    ]


def test_others_stand_beside_it_at_the_same_rank_and_budget(roberta: Path) -> None:
    planned = plan_recipe(roberta, choice={"name": "msplora", "r": 8}, measure_memory=False)
    beside = {(b.method, b.kind): (b.r, b.parameters) for b in planned.beside}
    assert {method for method, _ in beside} == set(BESIDE) - {"msplora"}
    assert ["servers pad to 16" in note for note in planned.notes] == [True]
    assert beside["lora", "r"] == (8, 294_912)
    # 36,864 numbers a rank: 3 ranks are 110,592, 4 would be above 135,168.
    assert beside["lora", "budget"] == (3, 110_592)
    assert beside["lor2c", "budget"] == (7, 129_024)
    # 24 linears of r + 768 and r (768 + 768 + 1).
    assert beside["vera", "r"] == (8, 24 * 776) and beside["adalora", "r"] == (8, 24 * 8 * 1537)
    assert beside["adapter", "r"] == (8, 12 * (2 * 8 * 768 + 8 + 768))
    assert all(cost <= 135_168 for (_, kind), (_, cost) in beside.items() if kind == "budget")


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A model's folder, and a plan of DyLoRA on it."""
    config = BertConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    folder = config_folder(tmp_path_factory.mktemp("small"), config, "BertForSequenceClassification")
    choice = {"name": "dylora", "r": 4, "target_modules": ["query", "value"]}
    return folder, plan_recipe(folder, choice=choice, measure_memory=False)


@pytest.mark.parametrize("method", BESIDE)
def test_what_stands_beside_it_is_what_would_be_built(method: str, small_plan: tuple[Path, Plan]) -> None:
    """The other methods' numbers come from formulas; here each is built at both ranks."""
    folder, actual = small_plan
    targets = {} if method in ("lor2c", "sharelor2c", "adapter") else {"target_modules": ["query", "value"]}
    same, paid = (next(b for b in actual.beside if (b.method, b.kind) == (method, kind)) for kind in ("r", "budget"))
    for beside in (same, paid):
        choice = {**BESIDE[method], **targets}
        assert beside.parameters == count_of(bare_model(folder), {**choice, **rank_fields(choice, beside.r)})
    assert paid.parameters <= actual.adapter


def test_a_budget_finds_the_largest_rank(roberta: Path) -> None:
    planned = plan_recipe(roberta, choice={"name": "msplora", "r": 8}, budget="0.25%", measure_memory=False)
    # 16,896 numbers a rank, ranks in steps of 4 (r/4 is whole): 16 fits into 0.25% of the model, 20 doesn't.
    assert planned.r == 16 and planned.adapter == 270_336 <= 0.0025 * planned.base < 20 * 16_896
    with pytest.raises(ConfigError, match="100 parameters are too few for msplora: rank 1 has 49,152 on this model"):
        plan_recipe(roberta, choice={"name": "msplora", "r": 8}, budget="100", measure_memory=False)
    # The ranks that a recipe names give way, whatever the method calls them.
    lora2 = {"name": "lora2", "r": 8, "outer_rank": 2, "target_modules": ["query"]}
    by_budget = plan_recipe(roberta, choice=lora2, budget="40k", measure_memory=False)
    assert (by_budget.r, by_budget.adapter) == (2, 12 * (2 * 1536 + 2 * 2 * 2 + 2))


def test_a_recipes_own_budget_is_met(roberta: Path) -> None:
    planned = plan_recipe(roberta, choice={"name": "lora", "budget": 300_000}, measure_memory=False)
    assert (planned.r, planned.adapter) == (8, 294_912)


@given(st.integers(0, 400), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(4, 60))
def test_the_largest_rank_is_that_of_a_search_through_all(budget: int, step: int, price: int, most: int) -> None:
    """Methods that take every rank, every second, every fourth, up to a highest."""

    def cost(rank: int) -> int | None:
        return price * rank if rank % step == 0 and rank <= most else None

    costs = {r: c for r in range(1, 41) if (c := cost(r)) is not None and c <= budget}
    expected = Fit(max(costs), costs[max(costs)]) if costs else None
    assert largest_rank(cost, budget, most=40) == expected


@pytest.mark.parametrize("name", [name for name, row in RECIPE_METHODS.items() if row.ranks is not None])
def test_every_method_with_a_rank_has_a_formula(name: str) -> None:
    """So that a budget is met without building the model once a rank."""
    choice = {"name": name} if name in ("lor2c", "adapter") else {"name": name, "target_modules": ["query", "value"]}
    with torch.device("meta"):
        model = ZOO["bert"].build()
    for rank in (4, 8):
        given = {**choice, **rank_fields(choice, rank)}
        assert count(model, method_config(given)) == count_of(model, given)


def test_a_rank_that_is_counted_but_not_taken_is_passed_over() -> None:
    """DyLoRA refuses ranks above its matrices, which no formula knows."""
    with torch.device("meta"):
        model = ZOO["bert"].build()
    actual = fit_rank(model, {"name": "dylora", "target_modules": ["query"]}, 10**6)
    assert actual == Fit(16, 16 * 32 * 4)


def test_budgets_are_read() -> None:
    assert [read_budget(t, 1_000_000) for t in ("0.1%", "300k", "1.2M", "12_000", "1B")] == [
        1000,
        300_000,
        1_200_000,
        12_000,
        1_000_000_000,
    ]
    for text in ("", "0", "-5", "many", "5%%"):
        with pytest.raises(ConfigError, match="a share of the model's"):
            read_budget(text, 1_000_000)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("method", ["msplora", "lor2c"])
def test_activations_counted_without_weights_are_those_autograd_keeps(name: str, method: str) -> None:
    zoo = ZOO[name]
    config = METHODS[method].config(zoo)
    with torch.device("meta"):
        bare = zoo.build()
    task = "classification" if name == "bert" else "instruct"
    without_dropout(bare)  # with dropout, attention on a CPU isn't fused
    planned = plan(bare, config, task=task, batch=3, length=32).memory
    assert planned is not None and planned.activations is not None
    model = get_peft_model(without_dropout(zoo.build()), METHODS[method].config(zoo)).train()
    ids = torch.full((3, 32), 7)
    labels = torch.tensor([0, 1, 2]) if name == "bert" else ids
    real = saved_bytes(model, {"input_ids": ids, "labels": labels})
    assert planned.activations == pytest.approx(real, rel=0.1)
    assert planned.a * 3 * 32 + planned.c * 3 * 32**2 == pytest.approx(planned.activations, rel=1e-6)
    weights = sum(p.numel() * p.itemsize for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (planned.weights, planned.trained, planned.optimizer) == (weights, 4 * trained, 8 * trained)
    assert planned.total == weights + 16 * trained + planned.activations


def test_llama_70b_is_planned_from_its_config(llama_70b: Path) -> None:
    choice = {"name": "msplora", "r": 64, "target_modules": ["q_proj", "v_proj"]}
    planned = plan_recipe(llama_70b, choice=choice, measure_memory=False)
    assert planned.base == 68_976_648_192
    # (64 + 3 x 32 + 80 x 16) ranks of queries (8192 + 8192) and of values (8192 + 1024).
    assert planned.adapter == (64 + 3 * 32 + 80 * 16) * (2 * 8192 + 8192 + 1024) == 36_864_000
    assert len(planned.modules) == 160


def test_the_command_prints_and_speaks_json(roberta: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(roberta), "method.r=8", "--no-memory"])
    assert done.exit_code == 0, done.output
    assert "135,168" in done.output and "110,592" in done.output and "AdaLoRA" in done.output
    paid = CliRunner().invoke(
        app, ["plan", str(roberta), "method.budget=300000", "method.name=lora", "--no-memory", "--json"]
    )
    assert paid.exit_code == 0 and json.loads(paid.stdout)["r"] == 8, paid.output
    both = CliRunner().invoke(app, ["plan", str(roberta), "method.r=16", "--budget", "5k", "--no-memory"])
    assert both.exit_code == 2 and "--budget finds the rank, and method.r=16 names it" in both.output
    none = CliRunner().invoke(app, ["plan", str(roberta), "method.name=bitfit"])
    assert isinstance(none.exception, ConfigError) and "no adapter to plan" in str(none.exception)
    recipe = CliRunner().invoke(app, ["plan", str(roberta), "roberta-mrpc", "--json", "--batch", "2", "--length", "16"])
    assert recipe.exit_code == 0, recipe.output
    content = json.loads(recipe.stdout)
    assert content["adapter"] == 135_168 and content["head"] == 768 * 768 + 768 + 2 * 768 + 2
    assert content["memory"]["batch"] == 2 and content["memory"]["total"] > 4 * content["base"]


def test_bad_input_is_refused(tmp_path: Path, roberta: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere' does not exist; .* holds roberta"):
        bare_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no config of a model in"):
        bare_model(tmp_path / "empty")
    with pytest.raises(ConfigError, match="msplora doesn't fit"):
        plan_recipe(roberta, choice={"name": "msplora", "r": 8, "target_modules": ["nothing"]}, measure_memory=False)
    with pytest.raises(ConfigError, match="there is no adapter to plan"):
        plan_recipe(roberta, choice={"name": "bitfit"}, measure_memory=False)
    bad = CliRunner().invoke(app, ["plan", str(roberta), "train.lr=1", "method.rank=4"])
    assert isinstance(bad.exception, RecipeError)


def test_what_is_no_model_is_told_by_the_command_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: some/base\ndata.train: demo\nmethod.name: lora\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for word, message in (
        ("default", "default is a recipe, .*: ziggurat plan embedded default"),
        (str(tmp_path / "run" / "recipe.yaml"), "is a recipe, .*: ziggurat plan some/base "),
        (str(tmp_path / "run"), "is the folder of a run, .*: ziggurat plan some/base "),
        (str(tmp_path / "adapter"), "ziggurat analyze "),
    ):
        done = CliRunner().invoke(app, ["plan", word])
        assert isinstance(done.exception, ConfigError) and re.search(message, str(done.exception)), done.exception


def test_a_recipe_chooses_head_batch_and_length(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"model": "x", "data": {"train": "demo", "max_length": 12}, "train": {"batch": 3}, "method": {"name": "lora"}}
    )
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    config.save_pretrained(str(tmp_path))
    planned = plan_recipe(tmp_path, recipe)
    assert planned.memory is not None and (planned.memory.batch, planned.memory.length) == (3, 12)
    assert planned.head == 2 * 16 + 2
