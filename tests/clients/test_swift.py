"""ms-swift trains, loads and merges a method by its own commands, on a tiny model. `.ci/clients` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
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


def test_grpo_sends_the_adapter_alone() -> None:
    """ms-swift's own function, asked with a trainer that holds what it reads; the client keeps what it would post."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from swift.rlhf_trainers import rollout_mixin  # pyright: ignore[reportMissingImports]
    from swift.rlhf_trainers.utils import peft_config_to_dict  # pyright: ignore[reportMissingImports]

    from methods_table import logits, zoo_config
    from tolerance import assert_models_agree
    from zoo import ZOO

    llama = ZOO["llama"]
    torch.manual_seed(0)
    model = get_peft_model(llama.build(), zoo_config("msplora", "llama", init_weights=False)).eval()  # type: ignore[arg-type]
    posted: list[tuple[Any, ...]] = []
    trainer = SimpleNamespace(
        model=model,
        vllm_mode="server",
        is_deepspeed_enabled=False,
        accelerator=SimpleNamespace(is_main_process=True, state=SimpleNamespace(deepspeed_plugin=None)),
        args=SimpleNamespace(enable_flattened_weight_sync=True),
        vllm_client=SimpleNamespace(update_adapter_flattened_param=lambda *words: posted.append(words)),
    )
    rollout_mixin.RolloutTrainerMixin._move_adapter_to_vllm(trainer)
    ((config, metadata, flat),) = posted
    json.dumps(peft_config_to_dict(config))  # as its client does
    bucket = rollout_mixin.FlattenedTensorBucket(metadata=metadata, flattened_tensor=flat)
    assert type(config) is LoraConfig
    plain = get_peft_model(llama.build(), config).eval()  # type: ignore[arg-type]
    held = set_peft_model_state_dict(plain, bucket.reconstruct_tensors())
    assert not held.unexpected_keys and not any("lora_" in name for name in held.missing_keys)
    assert_models_agree(logits(plain, llama.inputs()), logits(model, llama.inputs()))
