"""What PEFT has for LoRA alone: swapping in place, and LoRA+."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import AdamW

from methods_table import METHODS, logits, zoo_config
from ziggurat import create_loraplus_optimizer, hotswap_adapter
from ziggurat.errors import ConfigError
from zoo import ZOO

every_method = pytest.mark.parametrize("method", METHODS)
LLAMA = ZOO["llama"]


def saved(folder: Path, method: str, seed: int, **fields: object) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(LLAMA.build(), zoo_config(method, "llama", init_weights=False, **fields)).eval()
    model.save_pretrained(str(folder))
    return model


@every_method
def test_a_swapped_adapter_computes_as_the_loaded_one(method: str, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", method, 1)
    model = PeftModel.from_pretrained(LLAMA.build(), str(other_folder := tmp_path / "other")).eval()
    first = saved(tmp_path / "first", method, 0)
    hotswap_adapter(model, tmp_path / "first")
    assert torch.equal(logits(model, LLAMA.inputs()), logits(first, LLAMA.inputs()))
    tensors = {name: id(parameter) for name, parameter in model.named_parameters()}
    hotswap_adapter(model, other_folder)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == tensors
    assert torch.equal(logits(model, LLAMA.inputs()), logits(other, LLAMA.inputs()))


def test_a_swap_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", "msplora", 0)
    saved(tmp_path / "b", "msplora", 1, r=2, lora_alpha=3)
    saved(tmp_path / "c", "dylora", 1)
    before = logits(model, LLAMA.inputs())
    with pytest.raises(ConfigError, match=r"lora_alpha, r differ \(lora_alpha: 16 here, 3 there\)"):
        hotswap_adapter(model, tmp_path / "b")
    with pytest.raises(ConfigError, match="peft_type"):
        hotswap_adapter(model, tmp_path / "c")
    with pytest.raises(ConfigError, match="no adapter 'nobody'"):
        hotswap_adapter(model, tmp_path / "a", "nobody")
    assert torch.equal(logits(model, LLAMA.inputs()), before)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        hotswap_adapter(model, tmp_path / "a")


@every_method
def test_lora_plus_gives_the_output_side_its_rate(method: str) -> None:
    model = get_peft_model(LLAMA.build(), zoo_config(method, "llama"))
    if method in ("loraxs", "adapterdrop"):  # nothing, or no factor, trains on the output side
        with pytest.raises(ConfigError, match="no such factor"):
            create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)
        return
    optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    up = {name for name, rate in trained.items() if rate == pytest.approx(1.6e-2)}
    leaf = {name: name.rpartition(".")[2].rpartition(":")[2] for name in trained}
    ends = {"lora2": ("u",), "tiedlora": ("B", "v")}.get(method, ("B",))
    assert up == {name for name in trained if leaf[name].startswith(ends)}
    assert set(trained.values()) <= {1e-3, 1.6e-2}


def test_lora_plus_finds_the_factors_of_tiers_that_are_held_still() -> None:
    model = get_peft_model(LLAMA.build(), zoo_config("msplora", "llama"))
    model.set_stage(0.0)
    optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)
    up = {id(p) for p in optimizer.param_groups[1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in up}
    assert {name.rpartition(":")[2] for name in names} == {"B_global", "B_mid", "B_layer"}


def test_a_lora_adapter_is_swapped_by_peft() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="use PEFT's hotswap_adapter"):
        hotswap_adapter(model, "anywhere")


def test_lora_plus_without_a_method_is_refused() -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no such factor"):
        create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)
