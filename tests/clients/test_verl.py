"""verl's own functions collect an adapter of ours for its server, as plain LoRA. `.ci/clients` runs it.

Its engine's method is asked with an engine that holds what the method reads, and with a processor for a device: a whole
one wants an accelerator.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).parents[1]))
from methods_table import logits, zoo_config
from tolerance import assert_models_agree
from ziggurat.errors import ConfigError, ExportError
from zoo import ZOO

pytestmark = pytest.mark.skipif(os.environ.get("ZIGGURAT_CLIENT") != "verl", reason="no verl of its own: .ci/clients")
LLAMA = ZOO["llama"]


def adapted(method: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(LLAMA.build(), zoo_config(method, "llama", init_weights=False)).eval()  # type: ignore[arg-type]


def stock() -> Any:
    return get_peft_model(LLAMA.build(), LoraConfig(r=8, target_modules=LLAMA.targets))  # type: ignore[arg-type]


def sent(model: torch.nn.Module, base_sync_done: bool = True, lora_rank: int = 8, **fields: Any) -> tuple[dict, Any]:
    from verl.workers.engine.fsdp import transformer_impl  # pyright: ignore[reportMissingImports]

    engine_class = transformer_impl.FSDPEngine
    transformer_impl.get_device_id, transformer_impl.log_gpu_memory_usage = lambda: "cpu", lambda *_, **__: None
    config = SimpleNamespace(lora=fields, lora_rank=lora_rank, hf_config=LLAMA.build().config)
    engine: Any = SimpleNamespace(
        module=model,
        model_config=config,
        _uses_fsdp2_cpu_offload_policy=True,
        _is_offload_param=False,
        _qat_enabled=False,
        _merged_lora_per_tensor_param=lambda: engine_class._merged_lora_per_tensor_param(engine),
    )
    tensors, config = engine_class.get_per_tensor_param(engine, base_sync_done=base_sync_done)
    return dict(tensors), config


def check(tensors: dict[str, torch.Tensor], config: dict[str, Any], model: PeftModel) -> None:
    """Stock PEFT computes the same with what was sent."""
    known = {name: value for name, value in config.items() if name in LoraConfig.__dataclass_fields__}
    plain = get_peft_model(LLAMA.build(), LoraConfig(**known)).eval()  # type: ignore[arg-type]
    held = set_peft_model_state_dict(plain, tensors)
    assert not held.unexpected_keys and not any("lora_" in name for name in held.missing_keys)
    assert_models_agree(logits(plain, LLAMA.inputs()), logits(model, LLAMA.inputs()))


@pytest.mark.parametrize("method", ["msplora", "lora2"])
def test_verl_sends_the_adapter_alone(method: str) -> None:
    model = adapted(method)
    tensors, config = sent(model)
    theirs, _ = sent(stock())
    assert tensors.keys() == theirs.keys() and config["peft_type"] == "LORA"
    check(tensors, config, model)

    base, _ = sent(model, base_sync_done=False)
    expected, _ = sent(stock(), base_sync_done=False)
    assert base.keys() == expected.keys() and not any("lora" in name for name in base)
    assert all(torch.equal(base[name], tensor) for name, tensor in expected.items())


def test_what_would_leave_the_server_without_the_adapter_is_refused() -> None:
    from verl.utils import fsdp_utils  # pyright: ignore[reportMissingImports]

    with pytest.raises(ConfigError, match="verl merges PEFT's LoRA layers alone, and of MSPLoraConfig nothing"):
        fsdp_utils.fsdp_merge_unmerge(adapted("msplora"), do_merge=True)
    with pytest.raises(ConfigError, match="sharded the model by FSDP1"):
        fsdp_utils.collect_lora_params(SimpleNamespace(_fsdp_wrapped_module=adapted("msplora")), False, True)
    with pytest.raises(ConfigError, match=r"model.lora_rank=1, .* rank 7: set model.lora_rank=7, .* r=1 -- "):
        sent(adapted("msplora"), lora_rank=1)
    with pytest.raises(ExportError, match="path"):
        sent(adapted("lor2c"))


def two(rank: int, folder: str) -> None:
    """One of two processes: verl's own FSDP2 shards the model, and what it collects is written."""
    from verl.utils.fsdp_utils import apply_fsdp2  # pyright: ignore[reportMissingImports]

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = adapted("msplora")
    layer = "LlamaDecoderLayer"
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    apply_fsdp2(model, {"mesh": mesh}, {"wrap_policy": {"transformer_layer_cls_to_wrap": [layer]}})
    assert any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    tensors, config = sent(model)
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/sent.safetensors")
        LoraConfig(**{n: v for n, v in config.items() if n in LoraConfig.__dataclass_fields__}).save_pretrained(folder)
    torch.distributed.destroy_process_group()


def test_what_verls_fsdp2_has_sharded_is_gathered(tmp_path: Path) -> None:
    spawn(two, (str(tmp_path),), nprocs=2)
    config = LoraConfig.from_pretrained(str(tmp_path))
    check(load_file(tmp_path / "sent.safetensors"), config.to_dict(), adapted("msplora"))
