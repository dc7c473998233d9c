"""Tied weights: modules that hold the same parameter, such as an output layer and the embedding, and untying them.

An update of one module must not change the other. So a merge into a tied weight gives the adapted module a copy, and
the config's `tie_word_embeddings` is set to False.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from ziggurat.host.linear import AdaptedLinear, rows_merged


def note_shared(model: nn.Module, layers: Iterable[AdaptedLinear]) -> None:
    """Note in each of `layers`, before a merge, whether another module of `model` holds its weight too."""
    shared = _shared(model)
    for layer in layers:
        layer.shares_weight = id(layer.get_base_layer()._parameters.get("weight")) in shared


def untie(model: nn.Module) -> None:
    """Give each linear layer below an adapter of PEFT's built-in methods, which merge in place, an untied weight.

    Trained rows (trainable_token_indices) are merged first: PEFT would lose them.
    """
    shared = _shared(model)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, AdaptedLinear):
            if isinstance(getattr(layer, "base_layer", None), TrainableTokensWrapper):
                layer.base_layer = rows_merged(layer.base_layer)  # type: ignore[arg-type]
            base: Any = layer.get_base_layer()
            weight = base._parameters.get("weight") if isinstance(base, nn.Linear) else None
            if weight is not None and id(weight) in shared:
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _shared(model: nn.Module) -> set[int]:
    """The ids of the parameters that several modules hold."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in holders.items() if count > 1}


def note_untied(model: Any) -> None:
    """Set the config of a transformers `model` to untied where its output layer and its embedding differ.

    Only where `tie_word_embeddings` decides nothing else, as it does in BART (two embeddings) and T5 (a scale). Loading
    such a model compares the weights and leaves those that differ untied.
    """
    tied = getattr(model, "all_tied_weights_keys", None)
    if not tied:
        return
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    inside, outside = (getattr(layer, "weight", None) for layer in layers)
    if isinstance(inside, Tensor) and isinstance(outside, Tensor) and not _same(inside, outside):
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = len(tied) > 1  # PEFT has set it to False for all


def _same(first: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one; on the meta device only the object's identity tells."""
    return first is other or (not first.is_meta and first.data_ptr() == other.data_ptr() and first.shape == other.shape)
