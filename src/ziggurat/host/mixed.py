"""Batches in which each sample names an adapter: passing the names to the layers, and checking them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ziggurat.host.method_layer import ExpertsLayer, MethodLayer

BASE = "__base__"  # PEFT's name, in adapter_names, for a sample without adapter


class MixedTuner(BaseTuner):
    """The part of the tuner that passes `adapter_names` on."""

    #: The adapters that train together, on batches that name one for each sample.
    together: frozenset[str] = frozenset()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` (one adapter name a sample) to every layer for the length of one forward."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams") or 1
        for_decoder = [name for name in names for _ in range(beams)]
        encoder = _encoder(self.model) if beams > 1 else None
        # In beam search only the decoder sees every sample `num_beams` times.
        in_encoder = {id(module) for module in encoder.modules()} if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, names=names if id(module) in in_encoder else for_decoder), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, MethodLayer | ExpertsLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: list[str]) -> None:
        if self.training:
            self._check_trains_mixed(set(names) - {BASE})
        adapters = {name for module in self.modules() if isinstance(module, MethodLayer) for name in module.adapters}
        unknown = sorted(set(names) - adapters - {BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"The model has {', '.join(sorted(adapters))}; {BASE} means no adapter."
            )

    def _check_trains_mixed(self, names: set[str]) -> None:
        """Raise ValueError unless `share` has made this model ready for batches of these adapters in training."""
        refused = "Cannot pass `adapter_names` when the model is in training mode"
        if not names <= self.together:
            raise ValueError(
                f"{refused}: call model.eval() first. To train several adapters together, call "
                f"ziggurat.share(model, {sorted(names)})."
            )
        if inactive := sorted(names - set(self.active_adapters)):
            raise ValueError(f"{refused} and adapter {inactive[0]!r} isn't active: call ziggurat.share again.")
        sharded = any(hasattr(parameter, "full_tensor") for parameter in self.model.parameters())
        if sharded and (absent := sorted(self.together - names)):
            raise ValueError(
                f"{refused}: the model is sharded (by FSDP2 or a tp_plan), and this process has no sample of {absent}. "
                "The processes of a sharded model reduce the same gradients, so give each a sample of every adapter "
                "in every batch, or keep the model whole under DDP with find_unused_parameters=True."
            )
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                f"{refused} with gradient checkpointing, which computes layers again without them: switch it off."
            )


def _pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _encoder(model: nn.Module) -> nn.Module | None:
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return None if encoder is model else encoder
