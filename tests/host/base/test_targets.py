"""Default targets meet linears in layers; names that match nothing are answered with near ones."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
from torch import nn

from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.base.targets import DEFAULT_TARGETS, near_misses
from ziggurat.host.linear import is_adaptable
from zoo import ZOO

#: Their queries and values have other names in older versions of transformers.
NAMED_TWICE = ("swin", "vit")
ADDED = sorted(DEFAULT_TARGETS.keys() - OF_PEFT.keys())


def test_peft_decides_where_it_has_an_entry() -> None:
    assert {name: DEFAULT_TARGETS[name] for name in OF_PEFT} == OF_PEFT


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith(("plain", "no_stack"))])
def test_the_zoo_is_covered(name: str) -> None:
    defaults, targets = DEFAULT_TARGETS[ZOO[name].build().config.model_type], ZOO[name].targets
    assert defaults == targets or (name in NAMED_TWICE and set(targets) < set(defaults))


@pytest.mark.parametrize("model_type", ADDED)
def test_added_defaults_match_linears_inside_layers(model_type: str) -> None:
    import transformers

    config = transformers.CONFIG_MAPPING[model_type]()
    if hasattr(config, "text_config"):
        config.text_config.pad_token_id = None  # in older versions some pad with a token past their vocabulary
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    targets, anatomy = DEFAULT_TARGETS[model_type], Anatomy(model)
    named = targets if isinstance(targets, str) else r"(.*\.)?(" + "|".join(targets) + ")"
    hits = [name for name, _ in model.named_modules() if re.fullmatch(named, name)]
    assert hits and all(is_adaptable(model.get_submodule(name)) for name in hits)
    assert all(anatomy.find(name) for name in hits)
    if not isinstance(targets, str):
        met = {name.split(".")[-1] for name in hits}
        assert met == set(targets) or (model_type in NAMED_TWICE and len(met) == 2)


def test_gemma3_adapts_no_vision() -> None:
    assert re.fullmatch(str(DEFAULT_TARGETS["gemma3"]), "model.language_model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(str(DEFAULT_TARGETS["gemma3"]), "model.vision_tower.encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("name", "wanted", "first"),
    [
        ("bert", ["qury"], "query"),
        ("bert", ["QUERY"], "query"),
        ("llama", ["q_prj"], "q_proj"),
        ("llama", ["self_attention.q_proj"], "self_attn.q_proj"),
        ("gpt2", ["c_atn"], "c_attn"),
        ("bert", ["LayerNom"], "LayerNorm"),
        ("llama", r".*\.q_prooj$", "q_proj"),
        ("phi3", ["q_proj"], "qkv_proj"),
    ],
)
def test_the_nearest_name_comes_first(name: str, wanted: list[str] | str, first: str) -> None:
    assert near_misses(wanted, ZOO[name].build())[0] == first


def test_linears_come_before_other_modules() -> None:
    model = nn.ModuleDict({"projector": nn.Linear(4, 4), "projection": nn.LayerNorm(4), "head": nn.Linear(4, 4)})
    assert near_misses(["projectio"], model) == ["projector"]


def test_every_wanted_name_is_answered() -> None:
    near = near_misses({"q_porj", "v_porj"}, ZOO["llama"].build())
    assert {"q_proj", "v_proj"} <= set(near) and len(near) == len(set(near)) <= 6


def test_where_nothing_is_near_the_linears_are_named() -> None:
    model = ZOO["roberta"].build()
    near = near_misses(["c_attn"], model)
    assert near and {"query", "value", "key"} & set(near)
    assert all(any(path.endswith(f".{name}") for path, _ in model.named_modules()) for name in near)


def test_adapters_are_no_candidates() -> None:
    model = ZOO["plain_list"].build()
    before = near_misses(["lora_A", "querry"], model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"]))
    assert near_misses(["lora_A", "querry"], wrapped) == before
    assert before[0] == "query"


def test_a_model_without_modules_has_no_names() -> None:
    assert near_misses(["q_proj"], nn.Linear(2, 2)) == [] == near_misses([], ZOO["bert"].build())
