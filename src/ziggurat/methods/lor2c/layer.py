"""LoR2C's tuner layers: the path at a layer, and the linear layers with the LoRA that may replace it."""

from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.paths.layer import PathLayer


class LoR2CPath(PathLayer):
    """The paths that end at one layer."""


class LoR2CLinear(AdaptedLinear):
    """A query or value whose plain LoRA replaces its layer's path at an injection: y = W x + scale B A dropout(x).

    Until then it has no gradient and no cost in the forward, but its parameters are in the optimiser from the start.
    """
