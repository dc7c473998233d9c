"""Findings on real adapters and recipes; the table's evidence exists, and the docs say the same."""

import re
from collections.abc import Iterator
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LilyConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner

from methods_table import METHODS
from pages import SECTIONS, combinations
from ziggurat import LoR2CConfig, MSPLoraConfig
from ziggurat.cli import app
from ziggurat.doctor import checks
from ziggurat.doctor.checks import Finding
from ziggurat.doctor.facts import FACTS
from ziggurat.doctor.facts import METHODS as NAMED
from ziggurat.errors import ConfigError
from ziggurat.recipe.recipe import make_recipe
from zoo import ZOO

ROOT = Path(__file__).parents[1]


def saved(folder: Path, config: Any) -> Path:
    model = get_peft_model(ZOO["bert"].build(), config)
    model.save_pretrained(str(folder))
    return folder


def whats(findings: Iterator[Finding]) -> dict[str, str]:
    return {item.what: item.level for item in findings}


def test_the_page_has_the_table_of_the_data() -> None:
    page = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    assert combinations() in page


def test_every_row_is_whole_and_every_yes_has_a_test_that_exists() -> None:
    assert len({row.key for row in FACTS}) == len(FACTS)
    for row in FACTS:
        assert row.section in SECTIONS and set(row.cells) == set(NAMED), row.key
        assert set(row.cells.values()) <= {"yes", "limited", "no", "untested"}, row.key
        assert row.why or set(row.cells.values()) == {"yes"}, row.key
        if "yes" in row.cells.values():
            assert row.evidence, row.key
        for test in row.evidence:
            path, _, name = test.partition("::")
            source = (ROOT / path).read_text(encoding="utf-8")
            assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), test


def test_every_method_of_the_contracts_with_a_paper_has_a_column() -> None:
    assert set(NAMED) <= set(METHODS)


def test_what_the_table_says_of_merging_is_so() -> None:
    merges = next(row for row in FACTS if row.key == "merge").cells
    assert {method: status == "yes" for method, status in merges.items()} == {m: METHODS[m].merges for m in NAMED}
    weighted = next(row for row in FACTS if row.key == "weighted").cells
    assert {method: status == "yes" for method, status in weighted.items()} == {m: METHODS[m].combines for m in NAMED}


def test_this_machine_has_what_was_tested() -> None:
    assert list(checks.environment()) == []


def test_an_untested_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.17.0" if name == "peft" else real(name))
    (actual,) = checks.environment()
    assert actual.level == "error" and actual.what == "peft 0.17.0" and "pip install 'peft" in actual.do


def test_an_extra_of_another_version_is_told_by_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "3.1" if name == "matplotlib" else real(name))
    # What pyproject.toml says today: an editable install keeps what it said when it was made.
    monkeypatch.setattr(metadata, "requires", lambda name: ["peft>=0.21.2", 'matplotlib>=3.9; extra == "plots"'])
    extras = Message()
    extras["Provides-Extra"] = "plots"
    monkeypatch.setattr(metadata, "metadata", lambda name: extras)
    (actual,) = checks.environment()
    assert actual.level == "warning" and actual.what == "matplotlib 3.1" and "ziggurat-peft[plots]" in actual.why
    assert "matplotlib>=3.9" in actual.do


@pytest.mark.parametrize(
    ("variables", "what", "level"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"},
            "MSPLoRA with DeepSpeed ZeRO: works with limits",
            "note",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "MSPLoRA with FSDP1: works with limits", "note"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "MSPLoRA with FSDP2: works with limits", "note"),
        ({"WORLD_SIZE": "2"}, "MSPLoRA with DDP: works with limits", "note"),
    ],
)
def test_the_launcher_is_told_from_its_variables(variables: dict[str, str], what: str, level: str) -> None:
    assert whats(checks.distributed("msplora", variables)) == {what: level}
    assert whats(checks.distributed("msplora", {"WORLD_SIZE": "1"})) == {}


def test_a_quantised_base_is_told_from_its_config(tmp_path: Path) -> None:
    config = BertConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    config.save_pretrained(str(tmp_path))
    (actual,) = checks.base_model(str(tmp_path), "msplora")
    assert actual.what == "MSPLoRA with base quantised by gptq: works with limits" and actual.level == "note"
    assert "keep the adapter beside the model" in actual.do


def test_an_untrained_and_a_diverged_adapter(tmp_path: Path) -> None:
    fresh = saved(tmp_path / "fresh", MSPLoraConfig(r=4, target_modules=["query"]))
    assert whats(checks.adapter(fresh, {}))["the adapter's tensors"] == "warning"
    model = get_peft_model(ZOO["bert"].build(), LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    model.save_pretrained(str(tmp_path / "nan"))
    assert whats(checks.adapter(tmp_path / "nan", {}))["the adapter's tensors"] == "error"


def test_what_servers_refuse_is_said(tmp_path: Path) -> None:
    fields = {
        "target_modules": ["query"],
        "init_lora_weights": False,
        "rank_pattern": {"layer.1.attention.self.query": 3},
    }
    lora = LoraConfig(r=4, use_rslora=True, modules_to_save=["classifier"], **fields)
    actual = whats(checks.adapter(saved(tmp_path / "lora", lora), {}))
    assert any(what.startswith("2 tensors that are no factor pairs") for what in actual)
    assert actual["rank_pattern and use_rslora"] == "warning" and actual["ranks [3, 4]"] == "note"
    paths = whats(checks.adapter(saved(tmp_path / "paths", LoR2CConfig(r=4, init_weights=False)), {}))
    assert paths["LoR2C with vLLM: works with limits"] == "note"
    assert paths["LoR2C with llama.cpp: doesn't work"] == "error"
    pyramid = MSPLoraConfig(r=4, target_modules=["query"], init_weights=False)
    assert "served as rank 8" in whats(checks.adapter(saved(tmp_path / "pyramid", pyramid), {}))


def test_the_servers_take_adapters_of_decoders_alone(tmp_path: Path) -> None:
    for name, config in (("bert", BertConfig()), ("llama", LlamaConfig())):
        config.save_pretrained(str(tmp_path / name))
        model = get_peft_model(
            ZOO[name].build(), MSPLoraConfig(r=4, target_modules=ZOO[name].targets, init_weights=False)
        )
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / name)
        model.save_pretrained(str(tmp_path / f"{name}-adapter"))
        actual = whats(checks.adapter(tmp_path / f"{name}-adapter", {}))
        assert (actual.get("serving an adapter of bert") == "warning") == (name == "bert")
        assert ("served as rank 8" in actual) == (name == "llama")
    lora = LoraConfig(r=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(ZOO["llama"].build(), lora).save_pretrained(str(tmp_path / "outside"))
    actual = whats(checks.adapter(tmp_path / "outside", {}))
    assert actual["targets outside the layers (lm_head)"] == "warning" and "ranks [8]" not in actual


def test_lor2c_is_not_told_to_merge_into_weights() -> None:
    for key in ("vllm", "llama_cpp", "bitsandbytes", "hqq", "torchao", "packed"):
        why, instead = next(row for row in FACTS if row.key == key).reason("lor2c")
        assert "path" in why and "export" not in instead and "convert that" not in instead


def test_vera_and_lily_own_their_tensors(tmp_path: Path) -> None:
    for config in (VeraConfig(r=4, target_modules=["query"]), LilyConfig(r=4, target_modules=["query"])):
        actual = whats(checks.adapter(saved(tmp_path / str(config.peft_type.value), config), {}))
        assert not any("no factor pairs" in what for what in actual), actual
        assert actual[f"serving {config.peft_type.value}"] == "note"


def test_an_adapter_on_the_embedded_model_travels(tmp_path: Path) -> None:
    config = MSPLoraConfig(r=4, target_modules=["query"], init_weights=False)
    model = get_peft_model(ZOO["bert"].build(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "of-another-machine")
    model.save_pretrained(str(tmp_path / "run"))
    (tmp_path / "run" / "recipe.yaml").write_text("model: embedded\ndata.train: demo\nmethod.name: msplora\n")
    (tmp_path / "run" / "run.json").write_text('{"head": {}}')
    assert not any(what.startswith("base model") for what in whats(checks.adapter(tmp_path / "run", {})))


def test_a_path_of_this_machine_is_no_name_for_a_base(tmp_path: Path) -> None:
    config = MSPLoraConfig(r=4, target_modules=["query"], init_weights=False)
    config.base_model_name_or_path = str(tmp_path / "gone")
    model = get_peft_model(ZOO["bert"].build(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(str(tmp_path / "adapter"))
    findings = [item for item in checks.adapter(tmp_path / "adapter", {}) if item.what.startswith("base model")]
    assert [item.level for item in findings] == ["warning", "warning"]
    assert "a path of one machine" in findings[0].why and "config was not found" in findings[1].why


def test_a_recipe_that_cannot_fit_its_model(tmp_path: Path) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32).save_pretrained(
        str(tmp_path)
    )
    values = {"model": str(tmp_path), "data": {"train": "demo"}, "method": {"name": "msplora", "r": 8}}
    assert list(checks.recipe(make_recipe(values), {})) == []
    values["method"] = {"name": "msplora", "r": 8, "target_modules": ["nothing"]}
    (actual,) = checks.recipe(make_recipe(values), {})
    assert actual.level == "error" and "'nothing' matches no module" in actual.why
    for method, message in (
        ({"name": "lora", "target_modules": ["nope"]}, "'nope' matches no module"),
        ({"name": "msplora", "budget": 10}, "10 parameters are too few"),
        ({"name": "lora", "target_modules": ["query"], "budget": 10}, "10 parameters are too few"),
    ):
        (actual,) = checks.recipe(make_recipe({**values, "method": method}), {})
        assert actual.level == "error" and message in actual.why, actual
    paid = {"name": "lora", "target_modules": ["query"], "budget": 1000}
    assert list(checks.recipe(make_recipe({**values, "method": paid}), {})) == []


def test_what_a_recipe_needs_and_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32).save_pretrained(
        str(tmp_path)
    )
    values: dict[str, Any] = {"model": str(tmp_path), "data": {"train": "demo"}}
    adalora = make_recipe({**values, "method": {"name": "adalora", "target_modules": ["query"]}})
    (actual,) = checks.recipe(adalora, {"ACCELERATE_USE_DEEPSPEED": "true"})
    assert actual.level == "error" and "ranks directions by their gradients" in actual.why
    events = make_recipe({**values, "method": {"name": "lor2c", "r": 4, "merges": 1}})
    (actual,) = checks.recipe(events, {"ACCELERATE_USE_DEEPSPEED": "true"})
    assert actual.level == "error" and "moves weights" in actual.why
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    qlora = make_recipe({**values, "method": {"name": "qlora", "target_modules": ["query"]}})
    assert "bitsandbytes is not installed" in [item.why for item in checks.recipe(qlora, {})]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    adapter = saved(tmp_path / "pyramid", MSPLoraConfig(r=4, target_modules=["query"], init_weights=False))
    more = run.invoke(app, ["doctor", str(adapter), "train.lr=1"])
    assert more.exit_code == 2 and "train.lr=1 has no meaning" in re.sub(r"[^\w.=]+", " ", more.output)
    monkeypatch.setattr("ziggurat.doctor.machine._versions", lambda: iter(()))  # these, and disks, differ by machine
    monkeypatch.setattr("ziggurat.doctor.machine._disk", lambda: iter(()))
    assert "no problems found" in run.invoke(app, ["doctor"]).output
    bad = run.invoke(app, ["doctor", str(saved(tmp_path / "paths", LoR2CConfig(r=4, init_weights=False))), "--json"])
    assert bad.exit_code == 1 and '"level": "error"' in bad.stdout.splitlines()[0]
    (tmp_path / "empty").mkdir()
    assert isinstance(run.invoke(app, ["doctor", str(tmp_path / "empty")]).exception, ConfigError)
