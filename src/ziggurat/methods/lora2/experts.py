"""LoRA² at the parameters with all experts of a layer."""

from ziggurat.host.experts.layer import ParameterLayer
from ziggurat.methods.lora2.layer import Directions


class LoRA2Parameter(Directions, ParameterLayer):
    """The directions of all experts of a layer: each expert has its own planes, pruned with those of all layers."""
