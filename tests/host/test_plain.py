"""`plain_lora`: an adapter in memory as plain LoRA, as it is sent to a server after each step."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from methods_table import METHODS, logits, zoo_config
from tolerance import assert_models_agree
from ziggurat import plain_lora
from ziggurat.errors import ExportError
from zoo import ZOO

MERGING = [name for name, method in METHODS.items() if method.merges]


def adapted(method: str, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ZOO["llama"].build(), zoo_config(method, "llama", init_weights=False, **fields)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [None, 32])
@pytest.mark.parametrize("method", MERGING)
def test_stock_lora_computes_the_same(method: str, rank: int | None) -> None:
    model, inputs = adapted(method), ZOO["llama"].inputs()
    config, tensors = plain_lora(model, rank)
    assert type(config) is LoraConfig and config.lora_alpha == config.r
    stock = get_peft_model(ZOO["llama"].build(), config).eval()  # type: ignore[arg-type]
    held = set_peft_model_state_dict(stock, tensors)
    assert not held.unexpected_keys and not any("lora_" in name for name in held.missing_keys)
    assert_models_agree(logits(stock, inputs), logits(model, inputs))
    if rank is not None:
        assert config.r == rank and not config.rank_pattern
        assert {t.shape["lora_B" in name] for name, t in tensors.items()} == {rank}


def test_what_was_given_stays_when_training_goes_on() -> None:
    model = adapted("msplora", tiers=[{"name": "all", "groups": 1, "r": 4, "lora_alpha": 4}])
    given = plain_lora(model).tensors
    before = {name: tensor.clone() for name, tensor in given.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(plain_lora(model).tensors[name], tensor) for name, tensor in before.items())
    assert not any(tensor.requires_grad for tensor in given.values())


def test_trained_modules_come_along_and_wrappers_are_seen_through() -> None:
    torch.manual_seed(0)
    model = get_peft_model(ZOO["bert"].build(), zoo_config("lora2", "bert", init_weights=False)).eval()  # type: ignore[arg-type]
    compiled = torch.compile(model)
    config, tensors = plain_lora(compiled)  # type: ignore[arg-type]
    stock = get_peft_model(ZOO["bert"].build(), config).eval()  # type: ignore[arg-type]
    set_peft_model_state_dict(stock, tensors)
    inputs = ZOO["bert"].inputs()
    assert_models_agree(logits(stock, inputs), logits(model, inputs))


def test_a_rank_that_is_too_low_and_a_method_that_is_no_update_are_refused() -> None:
    with pytest.raises(ExportError, match=r"rank=4, and adapter 'default' has pairs of rank 7: give rank=7 or more"):
        plain_lora(adapted("msplora"), rank=4)
    with pytest.raises(ExportError, match="path"):
        plain_lora(adapted("lor2c"))
    with pytest.raises(ExportError, match="its adapters: default"):
        plain_lora(adapted("msplora"), adapter="other")


def test_trl_sends_an_adapter_of_ours_alone(tmp_path: Path) -> None:
    """TRL's own functions, asked as its trainer does; where the door has been open when TRL was imported."""
    trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    import ziggurat_door

    sync = SimpleNamespace(
        __name__=trainer.__name__,
        validate_lora_for_vllm_sync=trainer.validate_lora_for_vllm_sync,
        save_lora_adapter=trainer.save_lora_adapter,
    )
    ziggurat_door._collect_plainly(sync)
    model, inputs = adapted("msplora"), ZOO["llama"].inputs()
    assert sync.validate_lora_for_vllm_sync(model).r == 7
    out = tmp_path / "policy-1"
    for _ in range(2):  # the second takes the first one's place
        sync.save_lora_adapter(
            model, SimpleNamespace(device=torch.device("cpu"), is_main_process=True), "default", str(out)
        )
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert [path.name for path in tmp_path.iterdir()] == ["policy-1"]
    stock = PeftModel.from_pretrained(ZOO["llama"].build(), str(out)).eval()
    assert_models_agree(logits(stock, inputs), logits(model, inputs))
    # What TRL can't send alone it refuses by itself: it merges then.
    with pytest.raises(ValueError, match="path"):
        sync.validate_lora_for_vllm_sync(adapted("lor2c"))
    with pytest.raises(ValueError, match="bias="):
        sync.validate_lora_for_vllm_sync(adapted("msplora", bias="msplora_only"))
    # PEFT's own goes TRL's own way.
    lora = get_peft_model(ZOO["llama"].build(), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    assert sync.validate_lora_for_vllm_sync(lora) is lora.peft_config["default"]
