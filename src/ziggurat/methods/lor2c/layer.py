"""LoR2C's tuner layers: the path at a layer, and the linear layer that takes over when a path is given up."""

from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.paths.layer import PathLayer


class LoR2CPath(PathLayer):
    """The paths that end at one layer."""


class LoR2CLinear(AdaptedLinear):
    """A query or value whose plain LoRA wakes when its layer's path is given up: y = W x + scale B A dropout(x).

    Until then it gives no gradient and costs nothing, but its parameters are there, in the optimiser, from the start.
    """
