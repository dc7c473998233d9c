"""Tied weights: modules that hold one parameter, such as an output layer and the embedding, and coming apart exactly.

An update of one of them is none of the other. So where a merge reaches a tied weight, the adapted module gets a weight
of its own, and a config that says that the two are tied says so no longer than they are.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from ziggurat.host.linear import AdaptedLinear, rows_merged


def note_shared(model: nn.Module, layers: Iterable[AdaptedLinear]) -> None:
    """Tell each of `layers`, before a merge, whether another module of `model` holds its weight too."""
    shared = _shared(model)
    for layer in layers:
        layer.shares_weight = id(layer.get_base_layer()._parameters.get("weight")) in shared


def untie(model: nn.Module) -> None:
    """Give each linear layer below an adapter of PEFT's own methods, which merge in place, a weight of its own.

    With its trained rows, where it has some (trainable_token_indices): PEFT would merge past them.
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
    """Let the config of a transformers `model` say so where its output layer is the embedding no longer.

    Only where nothing else hangs on `tie_word_embeddings`, as BART's two embeddings do, and T5's scale. Loading such a
    model compares the weights and leaves those that differ apart.
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
    """Whether two names are those of one tensor: on the meta device they are known by the object alone."""
    return first is other or (not first.is_meta and first.data_ptr() == other.data_ptr() and first.shape == other.shape)
