"""vLLM reads a folder's serving export, made once. vLLM itself: tests/servers/test_runtimes.py."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from methods_table import logits, zoo_config
from tolerance import assert_models_agree
from ziggurat.errors import ConfigError, ExportError
from ziggurat.integrations.vllm_plugin import served
from zoo import ZOO


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZIGGURAT_CACHE", "~/cache")
    return tmp_path / "cache"


def saved(folder: Path, config: object) -> PeftModel:
    ZOO["llama"].build().save_pretrained(str(folder.with_name("base")))  # type: ignore[operator]
    torch.manual_seed(0)
    model = get_peft_model(ZOO["llama"].build(), config).eval()  # type: ignore[arg-type]
    model.save_pretrained(str(folder))
    return model


def test_a_folder_is_exported_once_and_again_when_it_changes(cache: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "my adapter's folder", str(tmp_path / "base")
    model = saved(folder, zoo_config("msplora", "llama", init_weights=False, task_type="CAUSAL_LM"))
    out = Path(served(str(folder), 8, base))
    assert out.parent == cache and json.loads((out / "adapter_config.json").read_text())["r"] == 8
    stock = PeftModel.from_pretrained(ZOO["llama"].build(), str(out)).eval()
    assert_models_agree(logits(stock, ZOO["llama"].inputs()), logits(model, ZOO["llama"].inputs()))

    written = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert Path(served(str(folder), 64, base)) == out
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == written
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(str(folder))
    assert Path(served(str(folder), 8, base)) != out


def test_what_the_server_cannot_take_is_refused_with_the_rank(cache: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "adapter", str(tmp_path / "base")
    saved(folder, zoo_config("msplora", "llama", r=8, task_type="CAUSAL_LM"))
    with pytest.raises(ExportError, match=r"needs rank 16, and this server allows 8: start it with --max-lora-rank 16"):
        served(str(folder), 8, base)
    saved(tmp_path / "paths", zoo_config("lor2c", "llama", task_type="CAUSAL_LM"))
    with pytest.raises(ExportError, match="path"):
        served(str(tmp_path / "paths"), 64, base)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no file"):
        served(str(folder), 64, base)


def test_everything_else_is_vllms_own(cache: Path, tmp_path: Path) -> None:
    saved(tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert served(str(tmp_path / "lora"), 8) == str(tmp_path / "lora")
    assert served("somebody/on-the-hub", 8) == "somebody/on-the-hub"
    assert not cache.exists()
