"""ms-swift's transfer of the adapter to vLLM, in GRPO: a ziggurat adapter is sent as plain LoRA.

ms-swift (4.6) takes PEFT's tensors and config of the adapter as they are. `ziggurat_door` puts this function before its
own. Where vLLM has no `enable_lora`, ms-swift merges, by PEFT, which works as it is.
"""

from collections.abc import Callable
from typing import Any

from ziggurat.host.method import method_of
from ziggurat.host.plain import plain_lora


def _move_adapter_to_vllm(original: Callable[[Any], None], trainer: Any) -> None:
    """Send the adapter of `trainer.model`. All processes must call this.

    Raises:
        ExportError: the method's update is none of linear layers.
    """
    model = trainer.model
    if method_of(model.peft_config.get("default")) is None:
        original(trainer)
        return
    from swift.rlhf_trainers import rollout_mixin as swift  # pyright: ignore[reportMissingImports]

    gathered = swift.get_gather_if_zero3_context(trainer)
    with gathered([parameter for name, parameter in model.named_parameters() if model.prefix in name]):
        config, tensors = plain_lora(model)
    if trainer.vllm_mode == "colocate":
        words = {"lora_name": swift.VLLM_LORA_NAME, "lora_int_id": swift.VLLM_LORA_INT_ID}
        words |= {"lora_path": swift.VLLM_LORA_PATH, "peft_config": config.to_dict(), "lora_tensors": tensors}
        if swift.vllm_supports_lora_load_inplace():
            words["load_inplace"] = True
        trainer.engine.engine.add_lora(swift.TensorLoRARequest(**words))
    elif trainer.accelerator.is_main_process:
        if getattr(trainer.args, "enable_flattened_weight_sync", True):
            bucket = swift.FlattenedTensorBucket(named_tensors=list(tensors.items()))
            trainer.vllm_client.update_adapter_flattened_param(
                config, bucket.get_metadata(), bucket.get_flattened_tensor()
            )
        else:
            trainer.vllm_client.update_adapter_param(config, tensors)
