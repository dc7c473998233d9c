"""The residual stream: its place among a transformer layer's arguments, its width, and the stacks that have one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ziggurat.errors import ConfigError
from ziggurat.host.base.unwrap import bare_tree, look_through
from ziggurat.host.linear import features, is_adaptable


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a layer's arguments: the first one by place, or `hidden_states`, or the first tensor.

    Raises:
        ConfigError: no argument is a floating-point tensor.
    """
    if args and isinstance(args[0], Tensor):
        return args[0]
    named = kwargs.get("hidden_states")
    if isinstance(named, Tensor):
        return named
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ConfigError(
        f"no hidden states among a layer's arguments ({len(args)} by place, {', '.join(kwargs) or 'none'} by name): "
        "the first argument, or one called hidden_states, must be a tensor."
    )


def stream_width(layer: nn.Module, hidden_size: int | None = None) -> int | None:
    """d of the residual stream that `layer` reads and writes, inferred from its weights' shapes; None if it can't be.

    d is an input size of a linear layer, an output size of one, and the size of most norms; attention heads and inner
    layers of experts fail one of these conditions. `hidden_size` from the model's config is taken where a norm has this
    size (MobileBERT has more norms in its bottlenecks).
    """
    ins, outs, norms = Counter[int](), Counter[int](), Counter[int]()
    for node in bare_tree(layer).walk():
        module = look_through(node.module)
        if module is None:
            continue
        if isinstance(module, nn.Linear | Conv1D) or is_adaptable(module):
            d_in, d_out = features(module)
            ins[d_in] += 1
            outs[d_out] += 1
        elif "norm" in type(module).__name__.lower():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                norms[len(weight)] += 1
    both = ins.keys() & outs.keys()
    if hidden_size in both and hidden_size in norms:
        return hidden_size
    if not both:
        return None
    return max(both, key=lambda size: (norms[size], min(ins[size], outs[size]), ins[size], -size))


def are_layers(model: nn.Module, stacks: Mapping[str, Sequence[str]]) -> set[str]:
    """The members of `stacks`, path -> paths of members, that list transformer layers, by transformers' own mark.

    Layers of its models can be checkpointed. Other repeated modules (the mergers of Qwen3-VL's vision tower) can't, and
    needn't keep the shape of their input. Where no member is marked, all stacks count.
    """
    marked = {
        stack
        for stack, layers in stacks.items()
        if any(isinstance(model.get_submodule(path), GradientCheckpointingLayer) for path in layers)
    }
    return marked or set(stacks)
