"""LoR2C's tuner: finds the layers of a model, puts paths around them, and refuses operations that paths don't allow."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import nn
from torch.optim import Optimizer

from ziggurat.host.base.offload import runs_on
from ziggurat.host.base.quantised import FLOATS, backend_arguments
from ziggurat.host.method import Card, Method
from ziggurat.host.paths.layer import CANT_MERGE, attach, detach, path_of
from ziggurat.host.registry import register
from ziggurat.host.saved.structure import StructureTuner
from ziggurat.host.site import Site
from ziggurat.host.values import check_step
from ziggurat.methods.lor2c.config import CITATION, EVENTS_FILE, LoR2CConfig
from ziggurat.methods.lor2c.equations import pair, parts, tensors
from ziggurat.methods.lor2c.layer import LoR2CLinear, LoR2CPath
from ziggurat.methods.lor2c.layout import Layout, holder_of, lay_out, means
from ziggurat.methods.lor2c.paths import Adapter, PathBank, acting
from ziggurat.methods.lor2c.structure import from_json


class LoR2CModel(StructureTuner):
    """Puts LoR2C adapters into a model. Made by PEFT from a `LoR2CConfig`; see there."""

    _layout: Layout | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        if config.restructures:
            # A copy, since training writes the structure into it, and the user may use the original for another model.
            self.peft_config[adapter_name] = config = copy.copy(config)
            config.log = list(config.log)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            assert self._layout is not None
            bank = self._bank()
            config = self.peft_config[adapter_name]  # the tuner may have copied it
            bank.adapters[adapter_name] = Adapter(config)
            bank.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            structure, done = (self._layout.structure, 0) if config.structure is None else from_json(config.structure)
            bank.set_structure(adapter_name, structure, done)
        finally:
            self._layout = None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _add_combined(self, adapters: list[str], weights: list[float], adapter: str, kind: str, **options: Any) -> None:
        by_name = self._bank().adapters
        for name in adapters[1:]:
            if by_name[name].structure != by_name[adapters[0]].structure:
                raise ValueError(
                    f"adapters {adapters[0]!r} and {name!r} have paths around different layers, so their updates don't "
                    "add up. Combine adapters of equal structure."
                )
        super()._add_combined(adapters, weights, adapter, kind, **options)

    def _sites(self, config: Any, model: nn.Module) -> Mapping[str, Site]:
        self._layout = lay_out(config, model)
        return self._layout.sites

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        if means(peft_config.exclude_modules, key):
            return _ExcludedModule()
        layout = self._layout or lay_out(peft_config, self.model)
        return key in layout.passed or key in layout.sites

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
        assert self._layout is not None
        bank = self._bank()
        stack, number = self._layout.place(current_key)
        if current_key in self._layout.passed:
            layer = path_of(target)
            if layer is None:
                layer = LoR2CPath(number, self._layout.passed[current_key].d_in, *_home(target))
                attach(target, self.model.get_submodule(holder_of(self.model, stack)), layer)
                bank.members.setdefault(stack, {})[number] = layer
        elif isinstance(target, LoR2CLinear):
            layer = target
        else:
            layer = LoR2CLinear(target, **backend_arguments(self.model))
            self._replace_module(parent, target_name, layer, target)
            bank.linear_layers.setdefault((stack, number), []).append(layer)
        if current_key in self._layout.sites:
            self._join(layer, adapter_name, peft_config, self._layout.sites[current_key])
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _bank(self) -> PathBank:
        return PathBank.at_root(self.model)

    def restructure(
        self, step: int, total_steps: int, optimizer: Optimizer | None = None, adapter: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the merges and injections due before optimiser step `step` (from 0) of `total_steps`; returns their
        records.

        In a custom loop call it before every step, with the optimiser, so that a path that moves keeps its moments. A
        transformers Trainer calls it itself.

        Raises:
            ConfigError: a step outside 0..total_steps.
        """
        check_step(step, total_steps)
        return self._bank().restructure(step, total_steps, optimizer, adapter)

    def path_counts(self, adapter: str = "default") -> dict[str, int]:
        """The numbers of parameters that `adapter` stores, that its forward uses, and that train at present."""
        return self._bank().counts(adapter)

    def write_self_contained(self, out: str | Path, tokenizer: Any = None, adapter: str | None = None) -> Path:
        """Write a model folder that needs transformers alone: see `serve.write_remote_code_model`."""
        from ziggurat.methods.lor2c.serve import write_remote_code_model

        return write_remote_code_model(self.model, tokenizer, out, adapter)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANT_MERGE.format(adapters=", ".join(map(repr, self.peft_config))))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        detach(model)
        return model


def _home(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The layer's device, and the floating dtype of its weights; never one of 8 bits, which factors can't have."""
    inside = [module for module in layer.modules() if not isinstance(module, BaseTunerLayer)]
    weights = [p for module in inside for p in module.parameters(recurse=False)]
    first = next((p for p in weights if p.dtype in FLOATS), weights[0])
    device = runs_on(layer) if first.is_meta else None
    return device or first.device, first.dtype if first.dtype in FLOATS else torch.float32


def step(
    root: nn.Module, adapter: str, config: LoR2CConfig, step: int, total: int, optimizer: Optimizer | None
) -> None:
    """Make the merges and injections due before the next step."""
    if step < total:
        PathBank.inside(root).restructure(step, total, optimizer, adapter)


def callback(config: LoR2CConfig) -> type[Any] | None:
    """The callback that prints each decision as a table under a Trainer."""
    if not config.restructures:
        return None
    from ziggurat.methods.lor2c.events import RestructureCallback  # loads transformers' Trainer

    return RestructureCallback


METHOD = Method(
    "lor2c",
    LoR2CConfig,
    tensors,
    pair,
    Card(
        "LoR2C",
        "2503.00572",
        "low-rank paths around layers; shared, merged, injected by its fields",
        CITATION,
        merges=False,
    ),
    check=None,
    sites=lambda config, model, anatomy: lay_out(config, model).sites,
    parts=parts,
    acting=acting,
    needs_steps=lambda config: config.restructures,
    step=step,
    step_fields=("merges", "injections"),
    step_does="moves weights during training",
    callback=callback,
    steps_in_trainer=False,
    events_file=EVENTS_FILE,
    finish=lambda model: model.path_counts(),
    write=lambda model, folder: model.write_self_contained(folder),
    older_names=(
        (r"(^|\.)path_bank\.lor2c_shared\.((?:[^.:]+\.)?)(.*):(\d+)$", r"\1bank_lor2c.lor2c_factors.\2\3:\4:A"),
        (r"\.lor2c_([AB])((?:\.[^.]+)?)$", r".lor2c_factors\2.\1"),
    ),
)
register(METHOD, tuner=LoR2CModel, layer=LoR2CLinear, bank=PathBank, more_layers=(LoR2CPath,))
