"""Axolotl trains, loads and merges a method by its own commands, on a tiny model. `.ci/clients` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_tables import save_tiny_llama

pytestmark = pytest.mark.skipif(
    os.environ.get("ZIGGURAT_CLIENT") != "axolotl", reason="no Axolotl of its own: .ci/clients"
)
CONFIG = {
    "base_model": "llama",
    "adapter": "msplora",
    "lora_r": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "ziggurat": {"even_scales": True},
    "datasets": [{"path": "train.jsonl", "type": "completion", "ds_type": "json"}],
    "dataset_prepared_path": "prepared",
    "output_dir": "out",
    "sequence_len": 48,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "learning_rate": 0.1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "val_set_size": 0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "use_cpu": True,
    "attn_implementation": "eager",
    "dataset_num_proc": 1,
}


def axolotl(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    line = [
        sys.executable,
        "-m",
        "axolotl.cli.main",
        command,
        "config.yaml",
        *(["--launcher", "python"] if command == "train" else []),
    ]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)


def test_axolotl_trains_and_merges_the_method(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    (tmp_path / "train.jsonl").write_text(
        "\n".join([json.dumps({"text": "the film is good and the film is fine"})] * 16)
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    done = axolotl(tmp_path, "train")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["even_scales"], config["r"]) == ("MSPLORA", True, 8)
    assert any(":B_global" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))

    done = axolotl(tmp_path, "merge-lora")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(tmp_path / at / "model.safetensors")[name] for at in ("llama", "out/merged"))
    assert (before.float() - after.float()).abs().max() > 1e-3  # by its default it writes the base, with exit code 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"merge_method": "memory_efficient"}, "would write the base without the adapter"),
        ({"trl": {"use_vllm": True}}, "Set trl.vllm_lora_sync: true"),
        ({"adapter": "lora"}, "name a method, one of"),
    ],
)
def test_what_would_go_on_without_the_adapter_is_refused(more: dict[str, object], said: str) -> None:
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]

    from ziggurat.errors import ConfigError
    from ziggurat.integrations.axolotl import ZigguratPlugin

    with pytest.raises(ConfigError, match=said):
        ZigguratPlugin().register(DictDefault({**CONFIG, **more}))
