"""ms-swift trains, loads and merges a method by its own commands, on a tiny model. `.ci/clients` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_tables import save_tiny_llama

pytestmark = pytest.mark.skipif(
    os.environ.get("ZIGGURAT_CLIENT") != "swift", reason="no ms-swift of its own: .ci/clients"
)
ROW = {"messages": [{"role": "user", "content": "say the film"}, {"role": "assistant", "content": "is good"}]}


def swift(folder: Path, *words: str) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MODELSCOPE_CACHE": str(folder / "cache")}
    done = subprocess.run(["swift", *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_swift_trains_and_merges_the_method(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(ROW)] * 8))
    path = subprocess.check_output([sys.executable, "-m", "ziggurat", "plugin-path", "swift"], text=True).strip()
    model = f"--model {tmp_path / 'llama'} --model_type llama --template default --torch_dtype float32"
    words = (
        f"--external_plugins {path} --tuner_type msplora --lora_rank 8 --target_modules q_proj v_proj --output_dir out"
    )
    words += " --dataset train.jsonl --max_steps 2 --per_device_train_batch_size 2 --max_length 48 --report_to none"
    words += " --save_steps 2 --add_version false --split_dataset_ratio 0 --dataset_num_proc 1 --learning_rate 0.1"
    words += " --dataloader_num_workers 0 --lora_alpha 16 --lora_dropout 0"
    swift(tmp_path, "sft", *model.split(), *words.split(), "--model_kwargs", '{"ziggurat": {"even_scales": true}}')
    folder = tmp_path / "out" / "checkpoint-2"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["even_scales"], config["r"], config["lora_alpha"]) == ("MSPLORA", True, 8, 16)
    assert any(":B_global" in name for name in load_file(folder / "adapter_model.safetensors"))

    swift(
        tmp_path, "export", "--adapters", str(folder), "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(tmp_path / at / "model.safetensors")[name] for at in ("llama", "merged"))
    assert (before - after).abs().max() > 1e-3
