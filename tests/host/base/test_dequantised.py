"""FP8 and MXFP4 checkpoints, which transformers dequantises on load where no kernels for them are: as a 16-bit base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config, Qwen2Config

from methods_table import logits
from tolerance import assert_models_agree
from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from zoo import seeded

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, BLOCK, TARGETS = 64, 32, ["q_proj", "v_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "msplora": lambda: MSPLoraConfig(r=4, target_modules=TARGETS, init_weights=False),
    "lora2": lambda: LoRA2Config(r=4, target_modules=TARGETS, init_weights=False),
    "lor2c": lambda: LoR2CConfig(r=4, init_weights=False),
}


def in_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's form: float8, with a scale for each block of 32 times 32."""
    if not name.endswith("_proj.weight"):
        return {name: weight}
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).view(rows, columns)
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def in_mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """gpt-oss's form: of the experts, two 4-bit numbers a byte, with an exponent for 32 of them; drawn at random."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: weight}
    experts, columns, rows = weight.shape
    drawing = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=drawing)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:-1], 123, dtype=torch.uint8)}


def checkpoint(folder: Path, config: Any, form: Callable[[str, Tensor], dict[str, Tensor]], **quantised: Any) -> None:
    seeded(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor for key, weight in load_file(file).items() for name, tensor in form(key, weight).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": quantised}))


def fp8(folder: Path) -> nn.Module:
    blocks = {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    checkpoint(folder, Qwen2Config(**SIZES, pad_token_id=0), in_fp8, quant_method="fp8", **blocks)
    config = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def mxfp4(folder: Path) -> nn.Module:
    kept = {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope, pad_token_id=0)
    checkpoint(folder, config, in_mxfp4, quant_method="mxfp4", **kept)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))


@pytest.mark.parametrize("load", [fp8, mxfp4])
def test_a_dequantised_base_is_one_like_any_other(load: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    ids = torch.randint(3, WIDTH, (2, 8), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        plain: Any = load(tmp_path / "base")
    except (ImportError, AttributeError, RuntimeError) as error:
        if Version(transformers.__version__) >= Version("5.20"):
            raise
        pytest.skip(f"transformers {transformers.__version__} loads no such checkpoint here: {error}")
    assert type(plain.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    before = logits(plain.eval(), inputs)
    coarsest = min((p.dtype for p in plain.parameters()), key=lambda dtype: dtype.itemsize)  # bfloat16 in older ones
    for name, config in CONFIGS.items():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # without a GPU it dequantises unasked
        same = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(logits(base.eval(), inputs), before)
        torch.manual_seed(0)
        model: Any = get_peft_model(base, config())
        model(**inputs, labels=ids).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad), name
        expected = logits(model.eval(), inputs)
        assert (expected - before).abs().max() > 1e-2
        model.save_pretrained(str(tmp_path / name))
        again = PeftModel.from_pretrained(same, str(tmp_path / name)).eval()
        assert torch.equal(logits(again, inputs), expected), name
        if name != "lor2c":
            assert_models_agree(logits(model.merge_and_unload(), inputs), expected, dtype=coarsest)
