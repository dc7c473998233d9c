"""`ziggurat with ... -- trl sft` and `trl dpo`: the programs as they are, on a tiny model. `.ci/clients` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_tables import save_tiny_llama

pytestmark = pytest.mark.skipif(os.environ.get("ZIGGURAT_CLIENT") != "trl", reason="no trl of its own: .ci/clients")
ROWS = {
    "sft": {"prompt": "say the film", "completion": " is good"},
    "dpo": {"prompt": "say the film", "chosen": " is good", "rejected": " is bad"},
}


@pytest.mark.parametrize("command", ROWS)
def test_trl_trains_the_method_unmodified(command: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "llama")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([json.dumps(ROWS[command])] * 8))
    fields = "--use_peft --lora_r 8 --lora_target_modules q_proj v_proj --max_steps 2 --per_device_train_batch_size 2"
    words = [command, *fields.split(), "--model_name_or_path", "llama", "--dataset_name", "data"]
    words += ["--output_dir", "out", "--report_to", "none", "--bf16", "false", "--use_cpu", "true"]
    line = [sys.executable, "-m", "ziggurat", "with", "msplora", "even_scales=true", "--", "trl", *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["even_scales"], config["r"]) == ("MSPLORA", True, 8)
    assert any(":B_global" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
