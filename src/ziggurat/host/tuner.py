"""What every method's tuner has in common: targets, checks before any change, mixed batches, unloading."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.host.anatomy import Anatomy
from ziggurat.host.bank import PairBank
from ziggurat.host.linear import AdaptedLinear, features, is_adaptable
from ziggurat.host.older import NoMatchingPeftModuleError, as_no_match, check_saved_whole
from ziggurat.host.paths import PathLayer
from ziggurat.host.quantised import changing
from ziggurat.host.siblings import introduce
from ziggurat.host.targets import DEFAULT_TARGETS, near_misses

#: An adapter may ask for this many numbers whatever its file holds: 256 MiB in float32.
UNCHECKED = 2**26
#: A rank that is no burden however small the matrix is.
FREE_RANK = 256
BASE = "__base__"  # PEFT's name, in adapter_names, for a sample without adapter


class LinearTuner(BaseTuner):
    """A tuner that puts `layer_cls` in the place of targeted linears. Subclasses give:

    prefix, tuner_layer_cls (the marker base of all their tuner layers), layer_cls,
    `_check_target` (the method's own demands on one linear), `_adapt` (add an
    adapter to an adapted linear) and `_makes` (how many numbers that takes).
    """

    layer_cls: type[AdaptedLinear]
    target_module_mapping = DEFAULT_TARGETS  # type: ignore[assignment]
    anatomy: Anatomy | None = None
    #: PEFT before 0.21.2 reads this of every model for sequence-to-sequence, and transformers 5.19 no longer has it.
    _prepare_encoder_decoder_kwargs_for_generation = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT before 0.21 calls `self.model.forward`, which runs no hooks of the root: LoRA²'s regulariser is one, and
        # LoR2C's hand-over where the root holds the layers.
        return self.model(*args, **kwargs)

    def _check_target(self, config: Any, path: str, module: nn.Module) -> None:
        """Raise ConfigError if the linear at `path` can't be adapted as `config` says. Changes nothing."""

    def _adapt(self, config: Any, adapter: str, layer: AdaptedLinear, path: str) -> None:
        """Add `adapter` to the adapted linear at `path`."""
        raise NotImplementedError

    def _makes(self, config: Any, path: str, module: nn.Module) -> dict[str, int]:
        """Name -> size of what `_adapt` makes for the linear at `path`. What is shared has the same name everywhere."""
        raise NotImplementedError

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Look at the whole model and raise before anything in it is changed."""
        self.anatomy = Anatomy(model, layers_pattern=getattr(peft_config, "layers_pattern", None))
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        made: dict[str, int] = {}
        for path, module in model.named_modules():
            if path and not path.startswith(inside) and self._check_target_module_exists(peft_config, path):
                if not is_adaptable(module):
                    raise ConfigError(
                        f"Target module {path!r} is a {type(module).__name__}, which is not supported: only linear "
                        "layers (torch.nn.Linear, Conv1D, quantised linears) are. Name linears in target_modules, or "
                        "leave this module out by exclude_modules."
                    )
                self._check_target(peft_config, path, module)
                made |= self._makes(peft_config, path, module)
        check_stored(peft_config, sum(made.values()))
        check_saved_whole(peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if not isinstance(as_no_match(error), NoMatchingPeftModuleError):
                raise
            near = near_misses(getattr(self.peft_config[adapter_name], "target_modules", None) or (), model)
            hint = f" Nearest names in this model: {', '.join(near)}." if near else ""
            raise NoMatchingPeftModuleError(f"{error}{hint}") from error
        finally:
            self.anatomy = None

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
        if isinstance(target, self.layer_cls):
            self._adapt(peft_config, adapter_name, target, current_key)
            target.set_adapter(self.active_adapters)
            return
        layer = self.layer_cls(target, **_quantization_kwargs(self.model))
        self._adapt(peft_config, adapter_name, layer, current_key)
        layer.set_adapter(self.active_adapters)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        if self.layer_cls.forward is AdaptedLinear.forward:  # another forward may prepare what its pair depends on
            introduce(parent, current_key, self.layer_cls)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's; but an adapter of which tensors are missing is refused, since what is left of it is another one.

        Raises:
            ConfigError: `state_dict` lacks tensors of the adapter.
        """
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        given = {_bare_name(name) for name in found}
        # The adapter's name is the last part of a parameter's name, or the last but one.
        wanted = [
            name
            for name, _ in model.named_parameters()
            if cls.prefix in name and adapter_name in name.rsplit(".", 2)[1:]
        ]
        lacking = [name for name in wanted if _bare_name(name) not in given]
        if lacking:
            raise ConfigError(
                f"adapter {adapter_name!r} lacks {len(lacking)} of the {len(wanted)} tensors its config asks for: "
                f"{', '.join(map(_bare_name, lacking[:3]))}{', ...' if len(lacking) > 3 else ''}. Was the file cut, or "
                "is its adapter_config.json another adapter's?"
            )
        return found

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        # First of all the method's own refusal: a quantised weight's says to merge elsewhere.
        self._check_merge_allowed()
        with changing(self._reached(adapter_names), "merged into"):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        merged = [(path, layer) for path, layer in self._linears() if layer.merged]
        with changing(merged, "unmerged from"):
            super().unmerge_adapter()

    def _linears(self) -> list[tuple[str, AdaptedLinear]]:
        return [(path, module) for path, module in self.model.named_modules() if isinstance(module, AdaptedLinear)]

    def _reached(self, adapter_names: list[str] | None) -> list[tuple[str, AdaptedLinear]]:
        """Path and layer of the linears that the adapters named (default: the active ones) reach."""
        names = set(self.active_adapters if adapter_names is None else adapter_names)
        return [(path, layer) for path, layer in self._linears() if names & set(layer.adapters)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        with changing(self._reached(adapter_names), "merged into") if merge else nullcontext():
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for name, child in list(model.named_children()):
            if isinstance(child, PairBank) and isinstance(child, self.tuner_layer_cls):
                delattr(model, name)
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` (one adapter name a sample) to every layer for the length of one forward."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams") or 1
        for_decoder = [name for name in names for _ in range(beams)]
        layers = (AdaptedLinear, PathLayer, AuxiliaryTrainingWrapper)
        encoder = _encoder(self.model) if beams > 1 else None
        # In beam search only the decoder sees every sample `num_beams` times.
        in_encoder = {id(module) for module in encoder.modules()} if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, names=names if id(module) in in_encoder else for_decoder),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")
        layers = [module for module in self.modules() if isinstance(module, AdaptedLinear | PathLayer)]
        known = {name for module in layers for name in module.adapters}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"The model has {', '.join(sorted(known))}; {BASE} means no adapter."
            )


def check_stored(config: Any, numbers: int) -> None:
    """Raise ConfigError if an adapter from a folder would take far more room than its file fills."""
    stored = config.stored_numbers
    if stored is not None and numbers > max(stored, UNCHECKED):
        raise ConfigError(
            f"the adapter's config asks for {numbers:,} numbers in this model, and its file holds {stored:,}: they "
            "don't belong together, or belong to another base model. To train such an adapter afresh, make a new "
            "config."
        )


def check_rank_here(name: str, rank: int, path: str, module: nn.Module) -> None:
    """Raise ConfigError if `rank` is above both what the linear at `path` has a use for and what costs nothing."""
    d_in, d_out = features(module)
    if rank > max(d_in, d_out, FREE_RANK):
        raise ConfigError(
            f"{name}={rank} is above the matrix: {path!r} maps {d_in} to {d_out}. Lower it to at most "
            f"{max(d_in, d_out)}, or leave the module out by exclude_modules."
        )


def _bare_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for part in ("_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


def _pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _encoder(model: nn.Module) -> nn.Module | None:
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return None if encoder is model else encoder


def _quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What PEFT's quantisation backends need to know of the model: how torchao weights are quantised again."""
    try:
        return {
            "get_apply_tensor_subclass": operator.attrgetter(
                "hf_quantizer.quantization_config.get_apply_tensor_subclass"
            )(model)
        }
    except AttributeError:
        return {}
