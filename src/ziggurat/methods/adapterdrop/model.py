"""The tuner of bottleneck adapters: puts them behind linears, and drops those of the lowest layers."""

from typing import Any

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.linear import AdaptedLinear, features
from ziggurat.host.root_hook import hook_into, unhook
from ziggurat.host.tuner import LinearTuner, check_rank_here
from ziggurat.methods.adapterdrop.config import AdapterDropConfig
from ziggurat.methods.adapterdrop.layer import AdapterDropLayer, BottleneckLinear, draw_depths


class AdapterDropModel(LinearTuner):
    """Puts bottleneck adapters into a model. Made by PEFT from an `AdapterDropConfig`; see there."""

    prefix = "adapterdrop_"
    tuner_layer_cls = AdapterDropLayer
    layer_cls = BottleneckLinear

    def _check_target(self, config: AdapterDropConfig, path: str, module: nn.Module) -> None:
        check_rank_here("r", config.r, path, module)
        if config.drop_layers or config.robust_drop:
            assert self.anatomy is not None
            layers = self.anatomy.place(path).num_layers  # raises where the path lies in no stack
            for name in ("drop_layers", "robust_drop"):
                if getattr(config, name) >= layers:
                    raise ConfigError(
                        f"{name}={getattr(config, name)} leaves none of the {layers} layers around {path!r} an "
                        f"adapter; at most {layers - 1}."
                    )

    def _makes(self, config: AdapterDropConfig, path: str, module: nn.Module) -> dict[str, int]:
        _, d_out = features(module)
        return {path: 2 * config.r * d_out + config.r + d_out if self._depth(path) >= config.drop_layers else 0}

    def _depth(self, path: str) -> int:
        assert self.anatomy is not None
        place = self.anatomy.find(path)
        return place.layer if place is not None else 0

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if self._depth(current_key) >= peft_config.drop_layers:
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, **kwargs)

    def _adapt(self, config: AdapterDropConfig, adapter: str, layer: AdaptedLinear, path: str) -> None:
        assert isinstance(layer, BottleneckLinear)
        layer.add(adapter, config, self._depth(path))
        if config.robust_drop:
            hook_into(self.model, draw_depths)

    def drop(self, layers: int, adapter: str = "default") -> None:
        """Leave out the bottlenecks of `adapter` in the first `layers` layers, for speed; 0 brings them back.

        Raises:
            ConfigError: a negative number, or one that leaves no layer an adapter.
        """
        linears = [
            module
            for module in self.model.modules()
            if isinstance(module, BottleneckLinear) and adapter in module.configs
        ]
        deepest = max((linear.depth[adapter] for linear in linears), default=-1)
        if not 0 <= layers <= deepest:
            raise ConfigError(
                f"drop({layers}): from 0 to {deepest} layers can be left out, the last with an adapter is {deepest}."
            )
        for linear in linears:
            linear.dropped[adapter] = layers

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        unhook(model, draw_depths)
        return model
