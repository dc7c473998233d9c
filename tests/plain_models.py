"""Models as a user may have written them, without transformers."""

import torch
from torch import Tensor, nn

WIDTH = 16
LAYERS = 4


class Block(nn.Module):
    """A residual block with a gated linear map and a `Sequential` inside that is no stack."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + torch.sigmoid(self.query(normed)) * self.value(normed)
        return x + self.mlp(x)


class RoutedBlock(nn.Module):
    """A residual block with experts in a numbered list, softly mixed."""

    def __init__(self, width: int = WIDTH, experts: int = 3) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Block(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1).unbind(-1)
        mixed = sum(share.unsqueeze(-1) * expert(x) for share, expert in zip(shares, self.experts, strict=True))
        return x + self.query(mixed)


class PlainList(nn.Module):
    """Blocks in a `ModuleList`, beside a stem and a head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PlainSequential(nn.Module):
    """Blocks in a `Sequential` that holds the stem and the head too."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Block() for _ in range(LAYERS)]
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class NoStack(nn.Module):
    """An MLP whose linears are attributes: no layers, as in PEFT's own tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(WIDTH, 2 * WIDTH)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.relu(self.lin0(x))))
