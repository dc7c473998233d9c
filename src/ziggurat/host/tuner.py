"""The tuner of every method: finds the sites, checks before any change, creates the tensors, loads, merges, unloads."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.utils import _get_submodules
from safetensors.torch import load_file
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.host.bank import Bank
from ziggurat.host.base.quantised import backend_arguments, changing
from ziggurat.host.base.remarks import check_fused_mixers, remark, remark_inner
from ziggurat.host.base.targets import (
    DEFAULT_TARGETS,
    check_takes_parameters,
    checked_specs,
    no_match_hint,
    sites_of,
    targets,
)
from ziggurat.host.base.tied import note_shared, note_untied
from ziggurat.host.base.vocabulary import check_rows, grown_beside_adapters
from ziggurat.host.blend import add_blend, check_request
from ziggurat.host.draws import Draws
from ziggurat.host.lifecycle import Watch, add_to_trainers, step_in_trainers, watch_trainers
from ziggurat.host.linear import AdaptedLinear, is_router
from ziggurat.host.method import Method, needs_steps, pair_of, specs_of, told_where
from ziggurat.host.mixed import MixedTuner
from ziggurat.host.older import NoMatchingPeftModuleError, as_no_match, check_saved_whole
from ziggurat.host.root_hook import stop_hooks
from ziggurat.host.saved.names import RenamesOnLoad, check_tensors, current_names
from ziggurat.host.saved.sites_table import to_table
from ziggurat.host.siblings import introduce
from ziggurat.host.site import Site
from ziggurat.host.tensors import check_pair

#: An adapter may ask for this many parameters whatever its file holds: 256 MiB in float32.
UNCHECKED = 2**26


class MethodTuner(MixedTuner):
    """Puts adapters of one method into a model. A subclass covers the cases that the two functions can't express."""

    method: ClassVar[Method]
    prefix: str
    tuner_layer_cls: Any
    layer_cls: type[AdaptedLinear]
    bank_cls: type[Bank]
    target_module_mapping = DEFAULT_TARGETS  # type: ignore[assignment]
    #: The sites of the adapter that is being added.
    sites: Mapping[str, Site] | None = None
    #: Its name.
    _adding: str = ""
    #: PEFT before 0.21.2 reads this of every model for sequence-to-sequence, and transformers 5.19 no longer has it.
    _prepare_encoder_decoder_kwargs_for_generation = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT before 0.21 calls `self.model.forward`, which runs no hooks of the root, where methods have some.
        return self.model(*args, **kwargs)

    @property
    def generate(self) -> Callable[..., Any]:
        """The model's `generate`, with each layer's pair computed once a call."""
        from ziggurat.host.generation import keeping_pairs

        return keeping_pairs(self.model, self.model.generate)

    def _sites(self, config: Any, model: nn.Module) -> Mapping[str, Site]:
        """Path -> site. Changes nothing."""
        return sites_of(self.method, config, model)

    def _check_pairs(self, config: Any, sites: Mapping[str, Site]) -> None:
        """Raise ConfigError where the two functions don't fit each other; checked once for sites of the same sizes."""
        computed: set[Any] = set()
        for site in sites.values() if self.method.pair is not None else ():
            at_site = config.at(site)
            specs = specs_of(self.method, at_site, site)
            sizes = (site.d_in, site.d_out, site.fused, *((key, spec.shape) for key, spec in specs.items()))
            if specs and sizes not in computed and all(spec.size for spec in specs.values()):
                computed.add(sizes)
                stored = {key: torch.empty(spec.shape, device="meta") for key, spec in specs.items()}
                with told_where(self.method, "pair", site):
                    pair = pair_of(self.method, at_site, site, stored)
                check_pair(pair, site.d_in, site.d_out, f"{self.method.card.shown} at {site.path!r}")

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()  # as in PEFT's LoRA, parameters alone
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        return targets(peft_config, key)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check the whole model and raise before anything in it is changed."""
        config: Any = peft_config
        check_takes_parameters(self.method, config)
        all_linear = config.target_modules == "all-linear"  # which PEFT replaces by names
        self.sites = self._sites(config, model)
        check_fused_mixers(model, self.sites)
        specs = checked_specs(self.method, config, self.sites)
        self._check_pairs(config, self.sites)
        check_stored(config, sum(spec.size for spec in specs.values() if spec.seed is None))
        check_saved_whole(config)
        check_rows(model, config.trainable_token_indices)
        if self.method.sites is None:
            remark(model, config, all_linear, self.sites)
        remark_inner(model, self.sites)
        config.read_sites = config.sites if config.ziggurat_version is not None else None
        config.sites = to_table(self.sites)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]
        for layer in layers:
            layer.forget(self._adding)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. An existing adapter of this name is removed first, so that the new one is fresh."""
        self._adding = adapter_name
        config: Any = self.peft_config[adapter_name]
        if config.sites is not None:
            # Another model uses this config, and saves it with that model's sites.
            self.peft_config[adapter_name] = copy.copy(config)
        kwargs.pop("state_dict", None)  # by its names PEFT would choose the targets, and shared tensors name none
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if not isinstance(as_no_match(error), NoMatchingPeftModuleError):
                raise
            named = getattr(self.peft_config[adapter_name], "target_modules", None) or ()
            raise NoMatchingPeftModuleError(f"{error}{no_match_hint(named, model)}") from error
        finally:
            self.sites = None
        if config.from_adapter is not None:
            from ziggurat.host.sets.inherit import take_over

            take_over(self.model, self.method, adapter_name, config)
        RenamesOnLoad.start(self.model, self.method)
        watch_trainers()
        if needs_steps(self.peft_config[adapter_name]):
            Watch.start(self.model)
            if self.method.steps_in_trainer:
                step_in_trainers(self.method)
        if self.method.callback is not None and (callback := self.method.callback(config)) is not None:
            add_to_trainers(callback)

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
        assert self.sites is not None
        site = self.sites[current_key]
        if not specs_of(self.method, peft_config.at(site), site):
            return  # the method has nothing here
        layer = (
            target if isinstance(target, self.layer_cls) else self.layer_cls(target, **backend_arguments(self.model))
        )
        self._join(layer, adapter_name, peft_config, site)
        layer.set_adapter(self.active_adapters)
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        cls = self.layer_cls
        if cls.forward is AdaptedLinear.forward and cls._add is AdaptedLinear._add:  # others may read something else
            introduce(parent, current_key, self.layer_cls)

    @property
    def parameter_cls(self) -> type[Any]:
        """The layer of a parameter with all experts of a layer; imported where it is needed."""
        from ziggurat.host.experts.layer import ParameterLayer

        return ParameterLayer

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the parameters among the sites. PEFT calls it where the config has `target_parameters`."""
        from accelerate import init_empty_weights

        from ziggurat.host.experts.layer import wrapped_experts

        assert self.sites is not None
        fused = {path: site for path, site in self.sites.items() if site.fused}
        routers = [path for path in self.sites if path not in fused and is_router(model.get_submodule(path))]
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for path, site in fused.items():
                experts, _, name = path.rpartition(".")
                layer = wrapped_experts(model, experts, self.method).layer(name, self.method, self.parameter_cls)
                self._join(layer, adapter_name, peft_config, site)
                layer.set_adapter(self.active_adapters)
                if adapter_name not in self.active_adapters:
                    layer.requires_grad_(False)
            for path in routers:
                parent, target, name = _get_submodules(model, path)
                if adapter_name not in getattr(target, "adapters", ()):  # else target_modules names it, too
                    self._create_and_replace(peft_config, adapter_name, target, name, parent, path)
        return [*fused, *routers]

    def _join(self, layer: Any, adapter: str, config: Any, site: Site) -> None:
        """Give `adapter` its tensors at `site`, in `layer` and in the bank."""
        at_site = config.at(site)
        specs = specs_of(self.method, at_site, site)
        bank = self.bank_cls.at_root(self.model) if any(spec.shared for spec in specs.values()) else None
        draws = None
        if self.method.draw is not None and config.blended is None:
            draws = Draws.start(self.model, self.method)
            draws.configs[adapter] = config
        layer.join(adapter, at_site, site, specs, bank=bank, draws=draws)
        if bank is not None:
            bank.quantization_backend = getattr(layer, "quantization_backend", None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's casts parameters; frozen tensors are buffers, and a pair multiplies both.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, self.tuner_layer_cls) and adapter_name in module.stores:
                    module.stores[adapter_name].widen()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return state | grown_beside_adapters(model, config, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, with the names of this version; an adapter with missing tensors is refused.

        A frozen tensor that another adapter of the model has already isn't loaded again.

        Raises:
            ConfigError: `state_dict` lacks tensors of the adapter.
        """
        method_config: Any = config
        if method_config.bank_file is not None:
            state_dict = {**load_file(method_config.bank_file), **state_dict}
        state_dict = current_names(state_dict, cls.method, model)
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(cls.method, model, adapter_name, renamed)
        from ziggurat.host.sets.memory import held_once

        return held_once(cls.method, model, adapter_name, renamed)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        # The method's own refusal comes first: a quantised weight's refusal recommends merging elsewhere.
        self._check_merge_allowed()
        reached = self._reached(adapter_names)
        note_shared(self.model, (layer for _, layer in reached))
        with changing(reached, "merged into"):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        merged = [(path, layer) for path, layer in self._linear_layers() if layer.merged]
        with changing(merged, "unmerged from"):
            super().unmerge_adapter()

    def _linear_layers(self) -> list[tuple[str, AdaptedLinear]]:
        return [(path, module) for path, module in self.model.named_modules() if isinstance(module, AdaptedLinear)]

    def _reached(self, adapter_names: list[str] | None) -> list[tuple[str, AdaptedLinear]]:
        """Path and layer of the linear layers that the adapters named (default: the active ones) reach."""
        names = set(self.active_adapters if adapter_names is None else adapter_names)
        return [(path, layer) for path, layer in self._linear_layers() if names & set(layer.adapters)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
            note_shared(self.model, (layer for _, layer in self._reached(adapter_names)))
        with changing(self._reached(adapter_names), "merged into") if merge else nullcontext():
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if self.bank_cls.of(model) is not None:
            delattr(model, self.method.bank)
        stop_hooks(model, self.method)
        note_untied(model)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if (draws := Draws.on(self.model, self.method)) is not None:
            draws.configs.pop(adapter_name, None)

    @contextmanager
    def added(self, adapter: str, config: Any) -> Iterator[None]:
        """Context for filling a new adapter of `config`: if that fails, the adapter is removed."""
        self.peft_config[adapter] = config
        try:
            self.inject_adapter(self.model, adapter)
            if self._has_wide(adapter):
                self._cast_adapter_dtype(adapter)  # a sum isn't rounded to the 16 bits of its base
            yield
        except BaseException:
            self.peft_config.pop(adapter, None)
            for module in self.model.modules():
                if isinstance(module, self.tuner_layer_cls):
                    module.forget(adapter)
            raise

    def _has_wide(self, adapter: str) -> bool:
        """Whether an adapter other than this one has tensors of 32 bits or more."""
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]
        others = (store for layer in layers for name, store in layer.stores.items() if name != adapter)
        return any(parameter.dtype.itemsize >= 4 for store in others for parameter in store.parameters())

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others, as PEFT's LoRA does; `blend.combined` says how.

        "linear" and "cat" are the exact weighted sum of the updates, by ranks that add up. The adapters may differ in
        targets and ranks. A module that some of them train whole becomes H + sum_i w_i (H_i - H), H the base model's.

        Raises:
            ValueError: an unknown adapter or combination, lists of unequal length, paths around different layers, or
                no density where one is needed. No adapter is added then.
        """
        if adapter_name in self.peft_config:
            return
        if any(getattr(self.peft_config.get(name), "target_parameters", None) for name in adapters):
            raise ValueError(
                "adapters of fused experts (target_parameters) can't be combined with weights. Merge the adapters into "
                "copies of the model, and combine those."
            )
        if self.method.pair is None:
            raise ValueError(f"{self.method.card.shown} makes no low-rank update, and can't be combined with weights.")
        kind = check_request(self.peft_config, adapters, weights, combination_type, svd_rank)
        options = {"rank": svd_rank, "density": density, "majority_sign_method": majority_sign_method}
        self._add_combined(adapters, weights, adapter_name, kind, **options)

    def _add_combined(self, adapters: list[str], weights: list[float], adapter: str, kind: str, **options: Any) -> None:
        add_blend(self, adapters, weights, adapter, kind, **options)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)


def check_stored(config: Any, parameters: int) -> None:
    """Raise ConfigError if an adapter from a folder would need far more memory than its file has."""
    stored = config.stored_numbers
    if stored is not None and parameters > max(stored, UNCHECKED):
        raise ConfigError(
            f"the adapter's config asks for {parameters:,} parameters in this model, and its file holds {stored:,}: "
            "they don't belong together, or belong to another base model. To train such an adapter afresh, make a new "
            "config."
        )
