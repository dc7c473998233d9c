"""A folder that transformers loads without ziggurat, and the injected LoRA as stock PEFT loads it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import versions
from fresh import Fresh
from methods_table import logits
from tolerance import assert_models_agree
from ziggurat import LoR2CConfig, MSPLoraConfig
from ziggurat.errors import ExportError
from ziggurat.export import export, merge
from ziggurat.methods.lor2c.serve import write_injected_lora, write_remote_code_model
from zoo import ZOO

pytestmark = versions.saves_whole

LOAD = """
import sys, torch, transformers
kind, folder, inputs, out = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True).eval()
given = torch.load(inputs)
result = {"logits": model(**given).logits.detach()}
if model.can_generate():
    result["tokens"] = model.generate(**given, max_new_tokens=8, min_new_tokens=8)
body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
result["body"] = body(**given)[0].detach()
result["forward"] = body.forward(**given)[0].detach()  # as vLLM calls it: past the hooks of the whole model
torch.save(result, out)
assert "ziggurat" not in sys.modules and "peft.tuners" not in sys.modules
"""


def adapted(model: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    zoo = ZOO[model]
    settings = {
        "r": 4,
        "lora_alpha": 32,
        "init_weights": False,
        "task_type": zoo.task_type,
        "merges": 1,
        "injections": 1,
    }
    peft = get_peft_model(zoo.build(), LoR2CConfig(**(settings | fields))).eval()
    for step in range(7):
        peft.restructure(step, 24)
    return peft


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    place = tmp_path_factory.mktemp("served")
    with closing(Fresh(place, "transformers.modeling_utils", HF_MODULES_CACHE=str(place / "modules"))) as programs:
        yield programs


@pytest.mark.parametrize(
    ("model", "kind", "fields"),
    [
        ("llama", "AutoModelForCausalLM", {}),
        ("gpt2", "AutoModelForCausalLM", {"share": True}),
        ("mixtral", "AutoModelForCausalLM", {}),
        ("bart", "AutoModelForSeq2SeqLM", {}),
        ("bert", "AutoModelForSequenceClassification", {}),
    ],
)
def test_a_written_folder_gives_the_same_without_ziggurat(
    model: str, kind: str, fields: dict, tmp_path: Path, fresh: Fresh
) -> None:
    peft, inputs = adapted(model, **fields), ZOO[model].inputs()
    expected = logits(peft, inputs)
    folder = write_remote_code_model(peft, None, tmp_path / f"served-{model}")
    assert torch.equal(logits(peft, inputs), expected)
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [kind, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    done = fresh.run(LOAD, *arguments)
    assert done.returncode == 0, done.stderr
    actual = torch.load(tmp_path / "out.pt")
    assert_models_agree(actual["logits"], expected)
    body = peft.get_base_model().base_model
    for way in ("body", "forward"):
        assert_models_agree(actual[way], body(**inputs)[0])
    if "tokens" in actual:
        assert torch.equal(actual["tokens"], peft.generate(**inputs, max_new_tokens=8, min_new_tokens=8))


def test_without_trust_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_remote_code_model(adapted("llama"), None, tmp_path / "served")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False)


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    plain = get_peft_model(ZOO["plain_list"].build(), LoR2CConfig(r=2))
    with pytest.raises(ExportError, match="no transformers model"):
        write_remote_code_model(plain, None, tmp_path / "a")
    two = adapted("llama")
    two.add_adapter("second", LoR2CConfig(r=2))
    with pytest.raises(ExportError, match="name one of the model's LoR2C adapters: default, second"):
        write_remote_code_model(two, None, tmp_path / "b")
    write_remote_code_model(two, None, tmp_path / "b", adapter="second")
    with pytest.raises(ExportError, match="isn't an empty folder"):
        write_remote_code_model(two, None, tmp_path / "b", adapter="second")


@versions.transformers_calls
def test_a_model_with_adapters_of_other_methods_is_not_written(tmp_path: Path) -> None:
    mixed = ZOO["llama"].build()
    mixed.add_adapter(MSPLoraConfig(r=4, target_modules=["q_proj"]), "pyramid")
    mixed.add_adapter(LoR2CConfig(r=4), "path")
    with pytest.raises(ExportError, match="adapters of other methods"):
        write_remote_code_model(mixed, None, tmp_path / "c")


def test_the_injected_lora_alone_loads_as_plain_lora(tmp_path: Path) -> None:
    peft, inputs = adapted("llama", merges=0, injections=4), ZOO["llama"].inputs()
    assert peft.path_counts()["active"] > 0
    write_injected_lora(peft, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path / "lora")).eval()
    assert_models_agree(logits(loaded, inputs), logits(peft, inputs))
    with pytest.raises(ExportError, match="in no layer, only paths"):
        write_injected_lora(adapted("llama", merges=0, injections=0), tmp_path / "none")


def test_the_command_writes_such_a_folder_from_an_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = ZOO["llama"].build()
    base.save_pretrained(str(tmp_path / "base"))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    peft, inputs = adapted("llama"), ZOO["llama"].inputs()
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match="goes around a whole layer"):
        export(tmp_path / "adapter", tmp_path / "lora")
    merge(tmp_path / "adapter", tmp_path / "served")
    served = AutoModelForCausalLM.from_pretrained(str(tmp_path / "served"), trust_remote_code=True).eval()
    assert_models_agree(logits(served, inputs), logits(peft, inputs))
    assert (tmp_path / "served" / "tokenizer.json").is_file()
