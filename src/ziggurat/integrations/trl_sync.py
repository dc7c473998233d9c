"""TRL's transfer of the adapter to vLLM, after each step: a ziggurat adapter is sent as plain LoRA.

TRL (`trl.experimental.async_grpo`, `async_distillation`) gathers tensors with `lora_` in their names, and needs a
LoraConfig. `ziggurat_door` puts these two functions before its own.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ziggurat.host.method import method_of
from ziggurat.host.plain import plain_lora


def validate_lora_for_vllm_sync(original: Callable[..., LoraConfig], model: Any) -> LoraConfig:
    """The config under which the active adapter goes to vLLM, checked by TRL's own rules.

    Raises:
        ValueError: it can't be sent alone, with the reason; TRL then sends merged weights.
    """
    active = model.active_adapters
    if len(active) != 1 or method_of(model.peft_config[active[0]]) is None:
        return original(model)
    config = plain_lora(model, adapter=active[0]).config
    return original(SimpleNamespace(active_adapters=active, peft_config={active[0]: config}))


def save_lora_adapter(
    original: Callable[..., None], model: Any, accelerator: Any, adapter_name: str, dest_dir: str
) -> None:
    """Write the adapter to `dest_dir` as plain LoRA, replacing an earlier one. All processes must call this."""
    if method_of(model.peft_config[adapter_name]) is None:
        original(model, accelerator, adapter_name, dest_dir)
        return
    config, tensors = plain_lora(model, adapter=adapter_name)
    if not accelerator.is_main_process:
        return
    out = Path(dest_dir)
    staged = out.parent / f".{out.name}.tmp"  # hidden, as vLLM looks for adapters beside it
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, staged / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(str(staged))
    shutil.rmtree(out, ignore_errors=True)
    os.rename(staged, out)
