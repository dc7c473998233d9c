"""LoR2C computed another way: each layer's forward replaced by the equation, with dense matrices. No hooks, no PEFT."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ziggurat.host.paths.layer import PathLayer
from ziggurat.lowrank.pair import FactorPair

#: First layer, last layer, and the dense (d, d) matrix scale * B A of a path.
DensePath = tuple[int, int, Tensor]


def raw_pair(path: PathLayer) -> FactorPair:
    """A and B of the adapter "default" without the scale."""
    return FactorPair(**path.stored("default"))


def add_paths(layers: Sequence[nn.Module], paths: Sequence[DensePath]) -> None:
    """Let `layers` compute h_out = Layer(h_in) + M h for every path (first, last, M), h what layer `first` reads."""
    read: dict[int, Tensor] = {}
    for number, layer in enumerate(layers):
        layer.forward = _with_paths(layer.forward, number, read, [p for p in paths if p[1] == number])


def _with_paths(
    forward: Callable[..., Any], number: int, read: dict[int, Tensor], paths: Sequence[DensePath]
) -> Callable[..., Any]:
    def explicit(*args: Any, **kwargs: Any) -> Any:
        read[number] = args[0] if args else kwargs["hidden_states"]
        out = forward(*args, **kwargs)
        first = out if isinstance(out, Tensor) else out[0]
        for start, _, matrix in paths:
            first = first + read[start] @ matrix.T
        return first if isinstance(out, Tensor) else (first, *out[1:])

    return explicit
