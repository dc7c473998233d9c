"""verl's transfer of the adapter to its server, after each step: a ziggurat adapter is sent as plain LoRA.

verl (0.9) gathers tensors with `lora_` in their names, and sends PEFT's config of the adapter with them.
`ziggurat_door` puts these functions before its own. The alternative `model.lora.merge` merges PEFT's LoRA layers alone,
and is refused.
"""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from peft import LoraConfig, PeftModel
from torch import Tensor

from ziggurat.errors import ConfigError
from ziggurat.export.serving import SERVING_RANKS
from ziggurat.host.method import method_of
from ziggurat.host.plain import plain_lora

ADAPTER = "default"  # verl knows no other
#: Model -> the config of the last gathered adapter, sent with the tensors.
_gathered: WeakKeyDictionary[PeftModel, LoraConfig] = WeakKeyDictionary()


def collect_lora_params(
    original: Callable[..., dict[str, Tensor]], module: Any, layered_summon: bool, base_sync_done: bool
) -> dict[str, Tensor]:
    """The tensors of `module` to send: the adapter's, or in the first call the base's. All processes must call this.

    Raises:
        ConfigError: FSDP1 has sharded the model.
        ExportError: the method's update is none of linear layers.
    """
    model = _ours(module)
    if model is None or not base_sync_done:
        sent = original(module, layered_summon, base_sync_done)
        return sent if model is None else {name: t for name, t in sent.items() if model.prefix not in name}
    if model is not module:
        raise ConfigError(
            "verl has sharded the model by FSDP1, whose shards of ziggurat's adapters can't be gathered: set "
            "actor_rollout_ref.actor.strategy=fsdp2."
        )
    _gathered[model], tensors = plain_lora(model, adapter=ADAPTER)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def get_per_tensor_param(
    original: Callable[..., tuple[Iterable[Any], Any]], engine: Any, *args: Any, **kwargs: Any
) -> tuple[Iterable[Any], Any]:
    """verl's tensors and the config to send with them: that of the plain LoRA.

    Raises:
        ConfigError: the plain LoRA's rank is above the highest that the server takes.
    """
    parameters, config = original(engine, *args, **kwargs)
    model = _ours(engine.module)
    if model is None or config is None or model not in _gathered:
        return parameters, config
    plain, max_rank = _gathered[model], engine.model_config.lora_rank
    if plain.r > next((rank for rank in SERVING_RANKS if rank >= max_rank), max_rank):
        raise ConfigError(
            f"model.lora_rank={max_rank}, by which verl sets its server's highest rank, and the adapter needs rank "
            f"{plain.r}: set model.lora_rank={plain.r}, and the method's by `ziggurat with METHOD r={max_rank} -- ...`."
        )
    return parameters, plain.to_dict()


def fsdp_merge_unmerge(original: Callable[..., None], module: Any, do_merge: bool) -> None:
    """verl's merging, for PEFT's own adapters.

    Raises:
        ConfigError: a ziggurat adapter: the server would go on with the base.
    """
    model = _ours(module)
    if model is not None:
        raise ConfigError(
            "model.lora.merge: verl merges PEFT's LoRA layers alone, and of "
            f"{type(model.peft_config[ADAPTER]).__name__} nothing. Leave that key out: the adapter then goes alone."
        )
    original(module, do_merge)


def _ours(module: Any) -> PeftModel | None:
    model = getattr(module, "_fsdp_wrapped_module", module)
    configs = getattr(model, "peft_config", {})
    return model if ADAPTER in configs and method_of(configs[ADAPTER]) is not None else None
