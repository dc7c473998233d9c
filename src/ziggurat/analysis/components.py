"""The parts of an adapter as plain values: a `Component` for each factor pair, `Collected` for a whole adapter."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from ziggurat.host.site import EXPERT
from ziggurat.lowrank.pair import FactorPair
from ziggurat.lowrank.spectrum import factored_svd, numerical_rank, singular_values

#: The part name of a linear layer's composed update, for methods with several components.
UPDATE = "update"
#: Behind the role of a parameter with all experts of a layer: which of them a component belongs to.
_OF_EXPERTS = re.compile(r"\[[\d-]+\]$")


@dataclass(frozen=True, eq=False)
class Component:
    """One low-rank update B A, with its scale in B.

    `part` is its name in the method: a tier's name ("global", "mid", "layer"), a plane ("outer", "inner"), "path",
    "injected", "lora", "adalora", "dylora" or "dora", or "update" for the composed update of one linear layer. `stack`,
    `role` and `layers` are its place (role "": around the layer itself); `group` numbers the pairs of a shared tier. A
    is (rank, d_in), B (d_out, rank), both on the CPU in float32 or float64. `stored`: whether the adapter's file holds
    it; composed updates are made of others. `adds`: the update is the sum of such parts. `tensors`: its tensors by
    name, with the number of entries; components that share a tensor have the same name. `experts`: those of each layer
    that have it; None where there are no experts.
    """

    part: str
    stack: str
    role: str
    layers: tuple[int, ...]
    A: Tensor
    B: Tensor
    group: int = 0
    stored: bool = True
    adds: bool = True
    tensors: Mapping[str, int] = field(default_factory=dict)
    experts: range | None = None

    @property
    def family(self) -> str:
        """`family_of` its role."""
        return family_of(self.role)

    @property
    def rank(self) -> int:
        """The allocated rank."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        """Entries of the two factors."""
        return self.A.numel() + self.B.numel()

    @property
    def pair(self) -> FactorPair:
        return FactorPair(self.A, self.B)

    @cached_property
    def finite(self) -> bool:
        """Whether neither factor has NaN or infinite entries."""
        return bool(self.A.isfinite().all() and self.B.isfinite().all())

    @cached_property
    def singular_values(self) -> np.ndarray:
        """Of B A, descending, min(rank, d_in, d_out) of them; all NaN where a factor isn't finite."""
        if not self.finite:
            return np.full(min(self.rank, *self.shape), np.nan)
        return singular_values(self.A, self.B).double().numpy()

    @cached_property
    def spaces(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of the column space (d_out, n) and the row space (d_in, n) of B A; n = 0 for zeros.

        Only directions with a singular value above rounding count.
        """
        U, s, V = factored_svd(self.A, self.B)
        n = numerical_rank(s)
        return U[:, :n], V[:, :n]

    @property
    def zero(self) -> bool:
        """Whether the update is exactly 0, as before training."""
        return self.finite and not bool((self.singular_values > 0).any())

    @property
    def name(self) -> str:
        """Part, layers, stack and role in words; unique in an adapter."""
        return f"{self.part} {span_text(self.layers)} of {self.stack or 'the model'}" + (
            f": {self.role}" if self.role else ""
        )


@dataclass(frozen=True, eq=False)
class Collected:
    """All components of one adapter. `source` names it, `method` is its PEFT type in lower case.

    `notes` for the reader: components of zeros or NaN, omissions with their reasons.
    """

    source: str
    method: str
    components: tuple[Component, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def parts(self) -> list[str]:
        """The parts, coarse to fine, "update" last."""
        return list(dict.fromkeys(component.part for component in self.components))

    def of(self, part: str) -> list[Component]:
        """The components of one part, by stack, role and first layer."""
        return [component for component in self.components if component.part == part]

    @property
    def stored_parts(self) -> list[str]:
        """The parts that the adapter's file holds."""
        return list(dict.fromkeys(component.part for component in self.components if component.stored))

    @property
    def adds_up(self) -> bool:
        """Whether the update is the sum of several stored parts, which can be compared with each other."""
        return len(self.stored_parts) > 1 and all(component.adds for component in self.components)

    @property
    def by_layer(self) -> str:
        """The part to compare layers by: the finest tier (Eq. 9 and 10 take the layer tier), else the update itself."""
        private = [p for p in self.stored_parts if all(len(c.layers) == 1 for c in self.of(p))]
        if private and any(len(c.layers) > 1 for c in self.components if c.stored) and UPDATE in self.parts:
            return private[-1]
        return UPDATE if UPDATE in self.parts else self.stored_parts[0]

    @property
    def layers(self) -> dict[str, int]:
        """Stack -> the number of its layers that the adapter reaches."""
        depths: dict[str, int] = {}
        for component in self.components:
            last = component.layers[-1] + 1 if component.layers else 0
            depths[component.stack] = max(depths.get(component.stack, 0), last)
        return depths

    @property
    def roles(self) -> list[str]:
        """All roles, in the order of the model; the experts of a layer are one."""
        return list(dict.fromkeys(component.family for component in self.components))


def family_of(role: str) -> str:
    """The role without the number of an expert: what all experts of a layer have in common."""
    return EXPERT.sub(r"\1", _OF_EXPERTS.sub("", role), count=1)


def span_text(layers: Iterable[int]) -> str:
    """Layers in words: "layer 3", "layers 0-3", "layers 0, 2, 4"."""
    numbers = list(layers)
    if not numbers:
        return "no layer"
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]}-{numbers[-1]}"
    return "layers " + ", ".join(map(str, numbers))


def short_roles(roles: Iterable[str]) -> dict[str, str]:
    """Role -> the shortest end of its path that no other role has; "layer" for a path around the layer."""
    whole = list(dict.fromkeys(roles))
    short = {}
    for role in whole:
        words = role.split(".")
        for count in range(1, len(words) + 1):
            end = ".".join(words[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in whole) == 1:
                break
        short[role] = end if role else "layer"
    return short
