"""Axolotl (0.21): `adapter: msplora`, or another method's name, in its config. It finds the plugin by the entry point.

    adapter: msplora
    lora_r: 8
    ziggurat: {even_scales: true}  # fields of the method's own config

The keys that Axolotl has for LoRA hold for the method too. `axolotl merge-lora` needs `merge_method: legacy`: its
default merges tensors called `lora_A` and `lora_B`, finds none here, and would write the base.
"""

from dataclasses import MISSING, fields
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import set_seed

from ziggurat.errors import ConfigError
from ziggurat.host.method import METHODS
from ziggurat.integrations.with_method import of_method


class ZigguratArgs(BaseModel):
    """Keys of an Axolotl config besides its own.

    ziggurat: fields of the method's config; they override Axolotl's `lora_` keys.
    """

    ziggurat: dict[str, Any] | None = None


class ZigguratPlugin(BasePlugin):
    """Brings every registered method as a value of `adapter`."""

    def register(self, cfg: Any) -> None:
        """Let `merge-lora` merge by PEFT.

        Raises:
            ConfigError: a way of merging, or of sending weights to vLLM, that handles LoRA's tensors only and would
                lose the adapter; `ziggurat` fields without one of our methods.
        """
        if not _of_ours(cfg):
            if cfg.get("ziggurat"):
                raise ConfigError(
                    f"ziggurat: gives fields of a method, and adapter is {cfg.get('adapter')!r}: name a method, one of "
                    f"{', '.join(sorted(name.lower() for name in METHODS))}."
                )
        elif (cfg.get("trl") or {}).get("use_vllm") and not cfg["trl"].get("vllm_lora_sync"):
            raise ConfigError(
                f"trl.use_vllm: Axolotl sends LoRA's tensors alone to vLLM, and none of adapter: {cfg['adapter']}. "
                "Set trl.vllm_lora_sync: true, and install ziggurat where vLLM runs: it then loads the adapter itself."
            )
        elif cfg.get("merge_method") not in (None, "legacy"):
            raise ConfigError(
                f"merge_method: {cfg['merge_method']} knows LoRA's tensors alone and would write the base without the "
                f"adapter. Use legacy for adapter: {cfg['adapter']}, or leave the key out."
            )
        else:
            cfg["merge_method"] = "legacy"

    def get_input_args(self) -> str:
        return "ziggurat.integrations.axolotl.ZigguratArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name.lower()) for name in METHODS]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """The model with the adapter, new or from `lora_model_dir`, and its config; nothing if it is not of ours."""
        if not _of_ours(cfg):
            return None
        config = _config(model, cfg)
        if config_only:
            return None, config
        upcast: Any = {"autocast_adapter_dtype": cfg.get("peft_autocast_adapter_dtype") is not False}
        if cfg.lora_model_dir:
            made = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **upcast)
        else:
            if cfg.seed is not None:
                set_seed(cfg.seed)
            made = get_peft_model(model, config, **upcast)
        made.print_trainable_parameters()
        return made, config  # pyright: ignore[reportReturnType]


def _of_ours(cfg: Any) -> bool:
    return str(cfg.get("adapter") or "").upper() in METHODS


def _config(model: Any, cfg: Any) -> PeftConfig:
    """The method's config from Axolotl's LoRA config. The method's defaults replace values that Axolotl leaves None."""
    from axolotl.loaders.adapter import load_lora  # pyright: ignore[reportMissingImports]

    _, lora = load_lora(model, cfg, config_only=True)
    defaults = {item.name: item.default for item in fields(METHODS[cfg.adapter.upper()].config)}
    unsaid = {
        name: default
        for name, default in defaults.items()
        if default not in (None, MISSING) and getattr(lora, name, default) is None
    }
    return of_method(lora, cfg.adapter, {**unsaid, **(cfg.ziggurat or {})})
