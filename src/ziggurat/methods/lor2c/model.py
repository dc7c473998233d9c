"""LoR2C's tuner: finds the layers of a model, puts paths around them, and refuses operations that paths don't allow."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import Tensor, nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.base.offload import runs_on
from ziggurat.host.base.quantised import FLOATS, backend_arguments
from ziggurat.host.method import Card, Method
from ziggurat.host.paths.layer import CANT_MERGE, attach, detach, handover_of, path_of
from ziggurat.host.registry import register
from ziggurat.host.saved.structure import StructureTuner
from ziggurat.host.site import Site
from ziggurat.host.tensors import Weight
from ziggurat.methods.lor2c.config import CITATION, EVENTS_FILE, STRUCTURE_KEY, LoR2CConfig
from ziggurat.methods.lor2c.equations import pair, parts, tensors
from ziggurat.methods.lor2c.layer import LoR2CLinear, LoR2CPath
from ziggurat.methods.lor2c.layout import Layout, lay_out, means
from ziggurat.methods.lor2c.paths import Adapter, PathBank, acting, from_json


class LoR2CModel(StructureTuner):
    """Puts LoR2C adapters into a model. Made by PEFT from a `LoR2CConfig`; see there."""

    structure_name = STRUCTURE_KEY
    _layout: Layout | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # The modules follow from the config alone, never from the names in a state dict.
        kwargs.pop("state_dict", None)
        config = self.peft_config[adapter_name]
        assert isinstance(config, LoR2CConfig)
        if config.restructures:
            # A copy, since training writes the structure into it, and the user may use the original for another model.
            config = copy.copy(config)
            config.log = list(config.log)
            self.peft_config[adapter_name] = config
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            assert self._layout is not None
            bank = self._bank()
            bank.known[adapter_name] = Adapter(config)
            bank.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            structure, done = (self._layout.structure, 0) if config.structure is None else from_json(config.structure)
            bank.set_structure(adapter_name, structure, done)
        finally:
            self._layout = None

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _add_combined(self, adapters: list[str], weights: list[float], adapter: str, kind: str, **options: Any) -> None:
        known = self._bank().known
        for name in adapters[1:]:
            if known[name].structure != known[adapters[0]].structure:
                raise ValueError(
                    f"adapters {adapters[0]!r} and {name!r} have paths around different layers, so their updates don't "
                    "add up. Combine adapters of equal structure."
                )
        super()._add_combined(adapters, weights, adapter, kind, **options)

    def _sites(self, config: Any, model: nn.Module) -> Mapping[str, Site]:
        anatomy = Anatomy(model, layers_pattern=config.layers_pattern)
        self._layout = lay_out(config, model, anatomy, self.get_model_config(model).get("model_type"))
        return self._layout.sites(model, anatomy)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        assert isinstance(peft_config, LoR2CConfig)
        if means(peft_config.exclude_modules, key):
            return _ExcludedModule()
        layout = self._layout
        if layout is None:
            layout = lay_out(peft_config, self.model, Anatomy(self.model, peft_config.layers_pattern), None)
        return key in layout.layers or key in layout.linear_layers

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
        if current_key in self._layout.layers:
            self._add_path(peft_config, adapter_name, target, current_key)
            return
        assert self.sites is not None
        stack, number = self._layout.linear_layers[current_key]
        if not isinstance(target, LoR2CLinear):
            linear = LoR2CLinear(target, **backend_arguments(self.model))
            self._replace_module(parent, target_name, linear, target)
            self._bank().linear_layers.setdefault(stack, {}).setdefault(number, []).append(linear)
            target = linear
        weight = target.weight_of_base(current_key)
        self._join(target, adapter_name, peft_config, self.sites[current_key], weight)
        target.asleep[adapter_name] = True
        target.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _add_path(self, config: LoR2CConfig, adapter: str, layer: nn.Module, key: str) -> None:
        assert self._layout is not None and self.sites is not None
        around, bank = self._layout.layers[key], self._bank()
        path = path_of(layer)
        if path is None:
            holder = self.model.get_submodule(around.holder)
            path = LoR2CPath(around.layer, handover_of(holder), around.width, *_home(layer))
            attach(layer, holder, path)
            bank.members.setdefault(around.stack, {})[around.layer] = path
        if not isinstance(path, LoR2CPath):
            raise ConfigError(f"layer {key!r} has a path of another method ({type(path).__name__}) already.")
        path.covers[adapter] = None
        if around.owner:
            self._join(path, adapter, config, self.sites[key], _no_weight(key))
        path.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _bank(self) -> PathBank:
        return PathBank.at_root(self.model)

    def restructure(
        self, step: int, total_steps: int, optimizer: Optimizer | None = None, adapter: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the merges and injections due before optimiser step `step` (from 0) of `total_steps`; returns their
        records.

        In a custom loop call it before every step, with the optimiser, so that a path that moves keeps its moments. A
        transformers Trainer calls it itself.
        """
        return self._bank().restructure(step, total_steps, optimizer, adapter)

    def path_counts(self, adapter: str = "default") -> dict[str, int]:
        """How many parameters `adapter` stores, how many the forward uses, and how many train at present."""
        return self._bank().counts(adapter)

    def write_self_contained(self, out: str | Path, tokenizer: Any = None, adapter: str | None = None) -> Path:
        """Write a model folder that needs transformers alone: see `serve.write_remote_code_model`."""
        from ziggurat.methods.lor2c.serve import write_remote_code_model

        return write_remote_code_model(self.model, tokenizer, out, adapter)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANT_MERGE.format(adapters=", ".join(map(repr, self.peft_config))))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        detach(model, LoR2CPath)
        return model

    @classmethod
    def structure_of(cls, bank: PathBank, adapter: str) -> Any:
        config = bank.known[adapter].config
        return {"structure": bank.structures()[adapter], "log": config.log} if config.restructures else None

    @classmethod
    def restore_structure(cls, bank: PathBank, adapter: str, plain: Any) -> None:
        try:
            structure, log = plain["structure"], [dict(entry) for entry in plain["log"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the tensor {STRUCTURE_KEY!r} beside the adapter's weights isn't the JSON that LoR2C writes "
                f"({error}): the file is damaged. Save the adapter again."
            ) from error
        bank.restore(adapter, structure)
        bank.known[adapter].config.log = log


def _no_weight(path: str) -> Weight:
    def read() -> Tensor:
        raise ValueError("a path goes around a whole layer")

    return Weight(path, read)


def _home(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The layer's device, and the floating dtype of its weights; never one of 8 bits, which factors can't have."""
    inside = [module for module in layer.modules() if not isinstance(module, BaseTunerLayer)]
    weights = [p for module in inside for p in module.parameters(recurse=False)]
    floating = [p for p in weights if p.dtype in FLOATS]
    first = (floating or weights)[0]
    device = runs_on(layer) or first.device if first.is_meta else first.device
    return device, first.dtype if floating else torch.float32


def _all_sites(config: LoR2CConfig, model: nn.Module, anatomy: Anatomy) -> dict[str, Site]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return lay_out(config, model, anatomy, model_type).sites(model, anatomy)


def needs_steps(config: LoR2CConfig) -> bool:
    """Whether paths merge or inject."""
    return config.restructures


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
    sites=_all_sites,
    parts=parts,
    acting=acting,
    needs_steps=needs_steps,
    step=step,
    step_fields=("merges", "injections"),
    step_does="moves weights during training",
    callback=callback,
    steps_in_trainer=False,
    events_file=EVENTS_FILE,
    finish=lambda model: dict(model.path_counts()),
    write=lambda model, folder: model.write_self_contained(folder),
    older_names=(
        (r"(^|\.)path_bank\.lor2c_shared\.((?:[^.:]+\.)?)(.*):(\d+)$", r"\1bank_lor2c.lor2c_factors.\2\3:\4:A"),
        (r"\.lor2c_([AB])((?:\.[^.]+)?)$", r".lor2c_factors\2.\1"),
    ),
)
register(METHOD, tuner=LoR2CModel, layer=LoR2CLinear, bank=PathBank, more_layers=(LoR2CPath,))
