"""PEFT's toy models with a stack of residual layers inside, for a method that adapts layers."""

from typing import Any

from torch import Tensor, nn

LAYERS = 3


class Residual(nn.Module):
    """h + W h: the smallest layer of a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


def add_layers(module: Any) -> None:
    """Give the toys of PEFT's test module `module` a list `layers` amid their parts, which keep their names."""
    if hasattr(module, "MLP"):
        module.MLP = mlp(module.MLP)
    if hasattr(module, "DummyModel"):
        module.DummyModel = dummy(module.DummyModel)


def stack(width: int) -> nn.ModuleList:
    return nn.ModuleList(Residual(width) for _ in range(LAYERS))


def mlp(toy: Any) -> type[nn.Module]:
    class MLP(toy):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.layers = stack(self.lin0.out_features)

        def forward(self, X: Tensor) -> Tensor:
            # Bounded, as a real stream is by its norms: inputs go up to 89, and learning rates to 0.5.
            hidden = self.relu(self.lin0(X.to(self.dtype))).tanh()
            for layer in self.layers:
                hidden = layer(hidden)
            return self.sm(self.lin1(self.drop(hidden)))

    return MLP


def dummy(toy: Any) -> type[nn.Module]:
    class DummyModel(toy):
        def __init__(self) -> None:
            super().__init__()
            self.layers = stack(self.linear.out_features)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.linear(self.embedding(input_ids))
            for layer in self.layers:
                hidden = layer(hidden)
            return self.lm_head(hidden)

    return DummyModel
