"""DyLoRA's tuner: puts the cuttable factors into a model and draws a rank for each forward in training."""

from typing import Any

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.linear import AdaptedLinear, features
from ziggurat.host.root_hook import hook_into, unhook
from ziggurat.host.tuner import LinearTuner
from ziggurat.methods.dylora.config import DyLoRAConfig
from ziggurat.methods.dylora.layer import DyLoRALayer, DyLoRALinear, draw_ranks


class DyLoRAModel(LinearTuner):
    """Puts DyLoRA adapters into a model. Made by PEFT from a `DyLoRAConfig`; see there."""

    prefix = "dylora_"
    tuner_layer_cls = DyLoRALayer
    layer_cls = DyLoRALinear

    def _check_target(self, config: DyLoRAConfig, path: str, module: nn.Module) -> None:
        d_in, d_out = features(module)
        if config.r > min(d_in, d_out):
            raise ConfigError(
                f"r={config.r} is above the matrix: {path!r} maps {d_in} to {d_out}. Lower r to at most "
                f"{min(d_in, d_out)}, or leave the module out by exclude_modules."
            )

    def _makes(self, config: DyLoRAConfig, path: str, module: nn.Module) -> dict[str, int]:
        return {path: config.r * sum(features(module))}

    def _adapt(self, config: DyLoRAConfig, adapter: str, layer: AdaptedLinear, path: str) -> None:
        assert isinstance(layer, DyLoRALinear)
        layer.add(adapter, config)
        hook_into(self.model, draw_ranks)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        unhook(model, draw_ranks)
        return model
