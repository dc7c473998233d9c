"""A new adapter on a trained one's shared tensors: taken over, trained, and refused values."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.optim import AdamW

from methods_table import METHODS, logits, zoo_config
from ziggurat import MSPLoraConfig, ShareLoRAConfig
from ziggurat.errors import ConfigError
from ziggurat.host.count import count
from ziggurat.host.plain import lora_pairs
from ziggurat.recipe.methods import method_problems
from zoo import ZOO

LLAMA = ZOO["llama"]
#: Method -> the keys that its layers have in common, and those that each has for itself.
SHARES = {
    "msplora": ({"A_global", "B_global", "A_mid", "B_mid"}, {"A_layer", "B_layer"}),
    "sharelora": ({"A"}, {"B"}),
    "tiedlora": ({"A", "B"}, {"u", "v"}),
    "aslora": ({"A"}, {"B"}),
}


def trained(folder: Path, method: str = "msplora", **fields: object) -> Path:
    """The folder of an adapter with values everywhere."""
    torch.manual_seed(0)
    get_peft_model(LLAMA.build(), zoo_config(method, "llama", init_weights=False, **fields)).save_pretrained(folder)
    return folder


def tensors(model: PeftModel, prefix: str) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if prefix in name and t.is_floating_point()}


def key(name: str) -> str:
    return name.rpartition(".")[2].rpartition(":")[2]


@pytest.mark.parametrize("method", [name for name in SHARES if name in METHODS])
def test_shared_tensors_are_taken_over_and_private_ones_train(method: str, tmp_path: Path) -> None:
    shared, private = SHARES[method]
    source = trained(tmp_path / "source", method)
    old = tensors(PeftModel.from_pretrained(LLAMA.build(), source), METHODS[method].prefix)
    config = zoo_config(method, "llama", r=8, from_adapter=str(source))  # 8 is the default: that of the source counts
    assert config.r == 4
    model = get_peft_model(LLAMA.build(), config)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {key(name) for name in parameters} == private
    assert count(LLAMA.build(), config) == sum(p.numel() for p in parameters.values())
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(**LLAMA.inputs()).logits.square().mean().backward()
        optimizer.step()
    now = tensors(model, METHODS[method].prefix)
    assert {key(name) for name in now if torch.equal(now[name], old[name])} == shared
    # Saved it is an adapter as any other: the folder that it began from may go.
    model.eval().save_pretrained(tmp_path / "new")
    (source / "adapter_config.json").unlink()
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "new", is_trainable=True)
    assert {key(name) for name, p in loaded.named_parameters() if p.requires_grad} == private
    assert torch.equal(logits(loaded.eval(), LLAMA.inputs()), logits(model, LLAMA.inputs()))
    pairs = lora_pairs(loaded)
    for path, layer in model.get_base_model().named_modules():
        if path in pairs:
            A, B = pairs[path]
            assert torch.equal(layer.get_delta_weight("default"), B @ A)


def test_stages_are_those_of_the_tiers_that_train(tmp_path: Path) -> None:
    source = trained(tmp_path / "source")
    config = MSPLoraConfig(from_adapter=str(source), freeze_tiers=["global"], train_in_stages=True)
    model = get_peft_model(LLAMA.build(), config)
    assert [model.base_model.set_stage(part) for part in (0.0, 0.6)] == ["mid", "layer"]


def test_a_float32_bank_stays_exact_in_a_model_of_16_bits(tmp_path: Path) -> None:
    source = trained(tmp_path / "source")
    old = tensors(PeftModel.from_pretrained(LLAMA.build(), source), "global")
    new = tensors(get_peft_model(LLAMA.build().bfloat16(), MSPLoraConfig(from_adapter=str(source))), "global")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_what_cannot_be_taken_over_is_refused_before_the_model_changes(tmp_path: Path) -> None:
    source = str(trained(tmp_path / "source"))
    with pytest.raises(ConfigError, match="an adapter can build on one of its own method"):
        ShareLoRAConfig(from_adapter=source)
    with pytest.raises(ConfigError, match=r"differs: r=16 \(4 there\), lora_alpha=8 \(16 there\). Leave these"):
        MSPLoraConfig(from_adapter=source, r=16, lora_alpha=8)
    with pytest.raises(ConfigError, match="there is no folder"):
        MSPLoraConfig(from_adapter=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="nothing in it is shared by several linear layers"):
        zoo_config("dylora", "llama", from_adapter=str(trained(tmp_path / "dylora", "dylora")))
    with pytest.raises(ConfigError, match=r"freeze_tiers=\[\]: nothing would be taken over"):
        MSPLoraConfig(from_adapter=source, freeze_tiers=[])
    base = LLAMA.build()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match="names 'globl', and the adapter has no such tier or tensor; it has global"):
        get_peft_model(base, MSPLoraConfig(from_adapter=source, freeze_tiers=["globl"]))
    with pytest.raises(ConfigError, match="nothing of it would train"):
        get_peft_model(base, MSPLoraConfig(freeze_tiers=["global", "mid", "layer"]))
    with pytest.raises(ConfigError, match=r"has no such tensor\. Was it trained on another base model"):
        get_peft_model(ZOO["bart"].build(), MSPLoraConfig(from_adapter=source))
    assert [name for name, _ in base.named_modules()] == names


def test_a_recipe_that_names_a_default_gets_it_or_an_error(tmp_path: Path) -> None:
    choice = {"name": "msplora", "from_adapter": str(trained(tmp_path / "source"))}
    assert method_problems(choice) == method_problems({**choice, "r": 4}) == []
    assert method_problems({**choice, "r": 8, "lora_dropout": 0.0}) == [
        "method.r: 8, and the adapter in method.from_adapter, whose shared tensors are taken over, has 4; leave the "
        "key out"
    ]


def test_a_fresh_tier_that_is_frozen_at_zero_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="B_global begins at zero and stays there.*from_adapter"):
        get_peft_model(ZOO["llama"].build(), zoo_config("msplora", "llama", freeze_tiers=["global"]))
    folder = trained(tmp_path / "bank")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(ZOO["llama"].build(), zoo_config("msplora", "llama", freeze_tiers=["A_layer"]))
        get_peft_model(ZOO["llama"].build(), zoo_config("msplora", "llama", from_adapter=str(folder)))
