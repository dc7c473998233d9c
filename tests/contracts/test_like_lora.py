"""The functions of LoRA: its config fields, swapping in place, LoRA+; and their table in docs/combinations.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import AdamW

from contracts.like_lora import PAIRS, REFUSED, table, written_into
from methods_table import METHODS, logits, zoo_config
from ziggurat import create_loraplus_optimizer, hotswap_adapter
from ziggurat.errors import ConfigError
from ziggurat.host.method_layer import layers_of
from zoo import ZOO

every_method = pytest.mark.parametrize("method", METHODS)
every_pair = pytest.mark.parametrize("method", PAIRS)
LLAMA = ZOO["llama"]
ROOT = Path(__file__).parents[2]


def saved(folder: Path, method: str, seed: int, **fields: object) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(LLAMA.build(), zoo_config(method, "llama", init_weights=False, **fields)).eval()
    model.save_pretrained(str(folder))
    return model


def active(method: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(LLAMA.build(), zoo_config(method, "llama", init_weights=False, **fields)).eval()


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """Path -> B A."""
    pairs = {layer.sites["default"].path: layer.effective_pair("default") for layer in layers_of(model, "default")}
    return {path: (B @ A).detach() for path, (A, B) in pairs.items()}


@pytest.mark.skipif("aslora" not in METHODS, reason="an older PEFT, where a method is refused")
def test_the_page_has_the_table_of_these_tests() -> None:
    page = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    assert table() in page
    assert written_into(page) == page
    assert "untested" not in table()


@every_pair
def test_rslora_divides_by_the_root_of_the_rank(method: str) -> None:
    ranks = {"ranks": [4, 4, 4]} if method == "msplora" else {}  # else each tier has a root of its own
    rooted, plain = active(method, use_rslora=True, **ranks), active(method, lora_alpha=32, **ranks)  # 16 / 2 = 32 / 4
    expected = updates(plain)
    for path, update in updates(rooted).items():
        torch.testing.assert_close(update, expected[path])


@every_pair
def test_a_rank_of_its_own(method: str) -> None:
    pattern = {"v_proj": [2, 1, 1] if method == "msplora" else 2}
    if why := REFUSED.get(("test_a_rank_of_its_own", method)):
        with pytest.raises(ConfigError, match=why):
            active(method, rank_pattern=pattern)
        return
    small = {p: torch.linalg.matrix_rank(update) for p, update in updates(active(method, rank_pattern=pattern)).items()}
    plain = {p: torch.linalg.matrix_rank(update) for p, update in updates(active(method)).items()}
    for path in plain:
        assert small[path] < plain[path] if path.endswith("v_proj") else small[path] == plain[path], path


@every_pair
def test_an_alpha_of_its_own_scales_one_module(method: str) -> None:
    pattern = {"layers.1.self_attn.q_proj": 32}
    if why := REFUSED.get(("test_an_alpha_of_its_own_scales_one_module", method)):
        with pytest.raises(ConfigError, match=why):
            active(method, alpha_pattern=pattern)
        return
    patterned = updates(active(method, alpha_pattern=pattern))
    for path, update in updates(active(method)).items():
        factor = 2 if path.endswith("layers.1.self_attn.q_proj") else 1  # lora_alpha is 16
        torch.testing.assert_close(patterned[path], factor * update)


@every_pair
def test_layers_and_modules_are_left_out(method: str) -> None:
    around = not METHODS[method].takes_targets
    left_out = ["layers.2"] if around else ["v_proj"]
    expected = {"model.layers.1"} if around else {f"model.layers.{n}.self_attn.q_proj" for n in (1, 2)}
    assert set(updates(active(method, layers_to_transform=[1, 2], exclude_modules=left_out))) == expected


@every_pair
def test_a_head_is_trained_and_saved_whole(method: str, tmp_path: Path) -> None:
    model = active(method, modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n]
    assert len(head) == 1 and head[0].requires_grad
    with torch.no_grad():
        head[0].normal_()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, LLAMA.inputs()), logits(model, LLAMA.inputs()))


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
    refused = REFUSED.get(("test_lora_plus_gives_the_output_side_its_rate", method))
    if refused or method == "adapterdrop":  # whose bottleneck is no factor
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
