"""Random values that a method draws once for each forward pass in training, such as DyLoRA's rank."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ziggurat.host.method import Method
from ziggurat.host.root_hook import RootHook

#: Passes that may wait for their backward, times the layers of each.
REMEMBERED = 4096


class Draws(RootHook):
    """A forward pre-hook on the base model's root: draws for every adapter before each forward pass in training.

    Gradient checkpointing computes a layer again in the backward, when other passes may have begun since. It restores
    torch's generators first, so the state of the CPU's generator tells which pass a layer is computed for: every pass
    draws from this generator, and so leaves it in a state of its own. A checkpoint that doesn't restore it
    (`preserve_rng_state=False`) gets the last draw.
    """

    def __init__(self, method: Method | None = None) -> None:
        super().__init__(method)
        self.configs: dict[str, Any] = {}
        #: Adapter -> the draw for the passes that begin from now on.
        self.last: dict[str, Any] = {}
        self._by_state: OrderedDict[bytes, dict[str, Any]] = OrderedDict()

    def put_on(self, root: nn.Module) -> None:
        root.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self.draw()

    def draw(self) -> None:
        """Draw for every adapter, from torch's generator of the CPU."""
        assert self.method is not None and self.method.draw is not None
        self.last = {adapter: self.method.draw(config) for adapter, config in self.configs.items()}

    def of(self, adapter: str) -> Any:
        """The draw for `adapter` in the pass that is being computed; None before the first one."""
        if torch.compiler.is_compiling():  # reading the generator's state would break the graph
            return self.last.get(adapter)
        state = torch.get_rng_state().numpy().tobytes()
        drawn = self._by_state.setdefault(state, self.last)
        if len(self._by_state) > REMEMBERED:
            self._by_state.popitem(last=False)
        return drawn.get(adapter)
