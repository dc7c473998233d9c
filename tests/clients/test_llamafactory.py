"""`ziggurat with ... -- llamafactory-cli train` and `export`: the program as it is. `.ci/clients` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_tables import save_tiny_llama

pytestmark = pytest.mark.skipif(
    os.environ.get("ZIGGURAT_CLIENT") != "llamafactory", reason="no LLaMA-Factory of its own: .ci/clients"
)


def run(folder: Path, *words: str) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "USE_CPU": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_llamafactory_trains_and_merges_the_method(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    rows = [{"instruction": "say the film", "input": "", "output": "is good"}] * 16
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    words = "--stage sft --do_train true --finetuning_type lora --lora_rank 8 --lora_target q_proj,v_proj"
    words += " --template default --dataset rows --dataset_dir data --cutoff_len 48 --max_steps 2 --report_to none"
    words += " --per_device_train_batch_size 2 --preprocessing_num_workers 1 --learning_rate 0.1 --use_cpu true"
    words += " --model_name_or_path llama --output_dir out --overwrite_output_dir true --lr_scheduler_type constant"
    line = [sys.executable, "-m", "ziggurat", "with", "msplora", "even_scales=true", "--", "llamafactory-cli", "train"]
    run(tmp_path, *line, *words.split())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["even_scales"], config["r"]) == ("MSPLORA", True, 8)
    assert any(":B_global" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))

    words = "--model_name_or_path llama --adapter_name_or_path out --template default --export_dir merged"
    words += " --export_device cpu"
    run(tmp_path, "llamafactory-cli", "export", *words.split())  # it only loads an adapter: the door suffices
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(tmp_path / at / "model.safetensors")[name] for at in ("llama", "merged"))
    assert (before.float() - after.float()).abs().max() > 1e-3
