"""Generation computes each layer's pair once: from the first token of an answer to its last, no factor changes."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ziggurat.host.linear import KEPT, AdaptedLinear


def keeping_pairs(model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` of `model`; while it runs, its adapted layers keep the pairs that they have computed.

    Where hooks bring the factors for each call (FSDP, DeepSpeed, offloading), pairs are computed for each, too.
    """

    @wraps(generate)
    def generated(*args: Any, **kwargs: Any) -> Any:
        layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
        if any(layer.is_hooked() for layer in layers):
            layers = []
        for layer in layers:
            object.__setattr__(layer, KEPT, {})
        try:
            return generate(*args, **kwargs)
        finally:
            for layer in layers:
                if KEPT in layer.__dict__:
                    object.__delattr__(layer, KEPT)

    return generated
