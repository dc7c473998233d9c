"""The common part of several matrices, which a shared tier can hold: of updates, and of gradients.

The mean M = sum_i D_i / n of matrices D_1, ..., D_n of one shape, in the place of each, has n ||M||_F^2 of their energy
sum_i ||D_i||_F^2. With the Gram matrix G_ij = <D_i, D_j>_F its share is

    shared = sum_ij G_ij / (n sum_i G_ii)

1 where all are equal, and 1/n where they are orthogonal, as independent ones of many entries nearly are. Where matrices
fall into several such families (the layers of each third, the adapters at each linear layer), energies are summed. A
line covers all experts of a layer; over depth, an expert is compared with those of the same number in other layers.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.linear import is_adaptable
from ziggurat.host.site import expert_in
from ziggurat.lowrank.pair import FactorPair

from .components import UPDATE, Collected, family_of

#: Sharing over groups is reported for so many contiguous parts of the depth, as MSPLoRA's mid tier has.
GROUPS = 3
#: The most entries of gradients that are converted to float64 at a time.
_ENTRIES = 2**24


@dataclass(frozen=True, eq=False)
class Item:
    """A matrix of one linear layer of one adapter: an update as its pair, or a gradient (d_out, d_in).

    `expert`: the number of the expert that it is part of; None where there are none.
    """

    adapter: str
    stack: str
    role: str
    layer: int
    num_layers: int
    matrix: FactorPair | Tensor
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        if isinstance(self.matrix, FactorPair):
            return self.matrix.B.shape[0], self.matrix.A.shape[1]
        return self.matrix.shape[0], self.matrix.shape[1]

    @cached_property
    def family(self) -> str:
        """The role that all experts of a layer have in common."""
        return family_of(self.role)

    def group(self, groups: int = GROUPS) -> int:
        """The contiguous part of the depth that the layer lies in."""
        return self.layer * min(groups, self.num_layers) // self.num_layers


@dataclass(frozen=True)
class Shared:
    """The common share of the energy `over` depth, group, expert, role or adapter, in the linear layers `where`.

    `number`: the largest number of compared matrices. `independent`: the share for orthogonal matrices of these
    energies.
    """

    over: str
    where: str
    number: int
    share: float
    independent: float


def updates(adapters: Sequence[Collected]) -> list[Item]:
    """The update of every linear layer of these adapters; paths around layers are left out."""
    items = []
    for number, collected in enumerate(adapters):
        name = f"{number}:{collected.source}"
        parts = [UPDATE] if UPDATE in collected.parts else collected.stored_parts[:1]
        depths = collected.layers
        for c in (c for part in parts for c in collected.of(part) if c.role and c.finite):
            for layer, expert in product(c.layers, c.experts or (None,)):
                items.append(Item(name, c.stack, c.role, layer, depths[c.stack], c.pair, expert))
    return items


def gradients(model: nn.Module, losses: Iterator[Tensor]) -> list[Item]:
    """The gradient of the sum of `losses` by the frozen weight of each linear layer that adapters of `model` adapt.

    `model`: the base model with a fresh adapter in it. `losses`: one for each batch, with the graph of its forward. A
    gradient has the size of its weight, in float32 on the CPU.

    Raises:
        ConfigError: there is no such weight, or one is quantised and has no gradient.
    """
    layers: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer") and is_adaptable(module)  # type: ignore[arg-type]
    }
    weights: dict[str, Any] = {path: layer.get_base_layer().weight for path, layer in layers.items()}
    if not weights or not all(weight.is_floating_point() for weight in weights.values()):
        why = "are quantised" if weights else "have no adapter"
        raise ConfigError(f"the linear layers {why}, and so give no gradients to compare: choose another method.name.")
    before = {path: weight.requires_grad for path, weight in weights.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses:
            for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                sums[path] = gradient.float().cpu() + sums.get(path, 0)
    finally:
        for path, weight in weights.items():
            weight.requires_grad_(before[path])
    anatomy = Anatomy(model)
    items = []
    for path, gradient in sums.items():
        place = anatomy.position(path)
        matrix = gradient.T if getattr(layers[path], "fan_in_fan_out", False) else gradient
        expert = expert_in(place.role)
        items.append(Item("", place.stack, place.role, place.layer, place.num_layers, matrix, expert))
    return items


def shared(items: Sequence[Item]) -> list[Shared]:
    """The common share over depth, over thirds of it, over a layer's experts, roles of one shape, and adapters."""
    adapters = {item.adapter for item in items}
    families: dict[str, list[Item]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item)
    lines: list[Shared] = []
    for role, of_role in families.items():
        lines += _line("depth", role, of_role, lambda i: (i.adapter, i.stack, i.shape, i.expert))
        lines += _line("group", role, of_role, lambda i: (i.adapter, i.stack, i.shape, i.expert, i.group()))
        if any(item.expert is not None for item in of_role):
            lines += _line("expert", role, of_role, lambda i: (i.adapter, i.stack, i.shape, i.layer))
    lines += _line("role", "", items, lambda i: (i.adapter, i.stack, i.layer, i.shape, i.expert))
    if len(adapters) > 1:
        for role, of_role in families.items():
            lines += _line("adapter", role, of_role, lambda i: (i.stack, i.layer, i.shape, i.expert))
    return lines


def _line(over: str, where: str, items: Sequence[Item], family: Callable[[Item], Hashable]) -> Iterator[Shared]:
    families: dict[Hashable, list[Item]] = {}
    for item in items:
        families.setdefault(family(item), []).append(item)
    grams = [gram(members) for members in families.values()]
    number, total = max(map(len, grams), default=0), sum(float(np.trace(g)) for g in grams)
    if number > 1 and total > 0:
        share = sum(float(g.sum()) / len(g) for g in grams) / total
        yield Shared(over, where, number, share, sum(float(np.trace(g)) / len(g) for g in grams) / total)


def gram(items: Sequence[Item]) -> np.ndarray:
    """(n, n): G_ij = <D_i, D_j>_F of matrices of one shape; of pairs tr(A_j A_i^T B_i^T B_j), with no dense one."""
    pairs = [item.matrix for item in items if isinstance(item.matrix, FactorPair)]
    if pairs:
        return _gram_of_pairs(pairs)
    matrices = [item.matrix for item in items if isinstance(item.matrix, Tensor)]
    products = torch.zeros(len(items), len(items), dtype=torch.float64)
    d_out, d_in = items[0].shape
    for rows in torch.arange(d_out).split(max(1, _ENTRIES // (len(items) * d_in))):
        flat = torch.stack([matrix[rows] for matrix in matrices]).double().flatten(1)
        products += flat @ flat.T
    return products.numpy()


def _gram_of_pairs(pairs: Sequence[FactorPair]) -> np.ndarray:
    """Each pair with all others at once: layers have hundreds of experts."""
    A, B = torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1)
    ranks = torch.tensor([pair.A.shape[0] for pair in pairs])
    number = torch.arange(len(pairs)).repeat_interleave(ranks)
    products = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for row, ranks_of_pair in zip(products, torch.arange(len(number)).split(ranks.tolist()), strict=True):
        row.index_add_(0, number, ((A[ranks_of_pair] @ A.T).double() * (B[:, ranks_of_pair].T @ B).double()).sum(0))
    return products.numpy()


def sentence(line: Shared) -> str:
    """A line for the terminal."""
    compared = {
        "depth": f"{line.number} layers",
        "group": f"thirds of the depth, up to {line.number} layers",
        "expert": f"{line.number} experts of each layer",
        "role": f"{line.number} roles of one shape in each layer",
        "adapter": f"{line.number} adapters at each linear layer",
    }[line.over]
    of = f" of {line.where}" if line.where else ""
    return f"{compared}{of}: {line.share:.1%} of the energy is common; independent ones: {line.independent:.1%}"
