"""How many numbers a method trains, from shapes alone: formulas, no adapter is built.

Symbols: a linear maps d_in to d_out; r is the rank, k LoRA²'s outer rank, d the width of the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.anatomy import Anatomy, Place
from ziggurat.host.linear import features, is_adaptable
from ziggurat.host.targets import DEFAULT_TARGETS
from ziggurat.methods.lor2c.layout import lay_out
from ziggurat.methods.msplora.pyramid import components


@dataclass(frozen=True)
class Target:
    """A linear to be adapted: its path, where it lies, and its shape."""

    path: str
    place: Place
    d_in: int
    d_out: int


def targets(model: nn.Module, config: Any, anatomy: Anatomy | None = None) -> list[Target]:
    """The linears that `config` adapts, in the model's order; the architecture's default where it names none."""
    config = copy.copy(config)
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULT_TARGETS:
            raise ConfigError(f"no default targets for a model of type {kind!r}: give target_modules.")
        named = DEFAULT_TARGETS[kind]
        config.target_modules = named if isinstance(named, str) else set(named)
    if config.target_modules == "all-linear":
        config = _maybe_include_all_linear_layers(config, model)
    anatomy = anatomy or Anatomy(model, getattr(config, "layers_pattern", None))
    found = []
    for path, module in model.named_modules():
        if path and is_adaptable(module) and check_target_module_exists(config, path):
            place = anatomy.find(path) or Place(stack=path, layer=0, role="", num_layers=1)
            found.append(Target(path, place, *features(module)))
    if not found:
        raise ConfigError(f"target_modules={config.target_modules!r} matches no linear of {type(model).__name__}.")
    return found


def lora(some: Iterable[Target], config: Any) -> int:
    """sum r (d_in + d_out), r as the rank pattern says it; DoRA: and a magnitude for each output, d_out."""
    pattern = config.rank_pattern or {}
    total = 0
    for t in some:
        r = pattern.get(get_pattern_key(list(pattern), t.path), config.r)
        total += r * (t.d_in + t.d_out) + (t.d_out if config.use_dora else 0)
    return total


def dylora(some: Iterable[Target], config: Any) -> int:
    """sum r (d_in + d_out), r the largest rank that is drawn."""
    return sum(config.r * (t.d_in + t.d_out) for t in some)


def adalora(some: Iterable[Target], config: Any) -> int:
    """sum r (d_in + d_out) + r, r the rank that training begins with."""
    return sum(config.init_r * (t.d_in + t.d_out + 1) for t in some)


def vera(some: Iterable[Target], config: Any) -> int:
    """sum r + d_out: the two vectors of each linear; the random factors aren't trained."""
    return sum(config.r + t.d_out for t in some)


def lily(some: Iterable[Target], config: Any) -> int:
    """sum over groups of num_B r d_out + ceil(n / stride_A) r d_in + n num_B r.

    A group is the n linears of one target and one shape: they share their experts B, `stride_A` neighbours share one A,
    and each has a router of its own.
    """
    named = config.target_modules
    groups: dict[tuple[str, int, int], int] = {}
    for t in some:
        if named is None or named == "all-linear":
            ends = [t.path.rpartition(".")[2]]
        else:
            ends = [named] if isinstance(named, str) else [name for name in named if t.path.endswith(name)]
        if ends:
            key = (ends[-1], t.d_in, t.d_out)
            groups[key] = groups.get(key, 0) + 1
    r, experts = config.r, config.num_B
    return sum(
        experts * r * d_out + -(-n // config.stride_A) * r * d_in + n * experts * r
        for (_, d_in, d_out), n in groups.items()
    )


def adapter(some: Iterable[Target], config: Any) -> int:
    """sum 2 r d_out + r + d_out over the linears whose layer isn't dropped: down, up and their biases."""
    kept = [t for t in some if t.place.layer >= config.drop_layers]
    return sum(2 * config.r * t.d_out + config.r + t.d_out for t in kept)


def msplora(some: Iterable[Target], config: Any) -> int:
    """Each shared pair once: sum over pairs of tier rank x (d_in + d_out) (arXiv 2503.21838, Eq. 7)."""
    pairs = {}
    for t in some:
        tiers = config.pyramid(t.place.role)
        for tier, part in zip(tiers, components(tiers, t.place, t.d_in, t.d_out), strict=True):
            pairs[part.pair] = tier.r * (t.d_in + t.d_out)
    return sum(pairs.values())


def lora2(some: Iterable[Target], config: Any) -> int:
    """sum k (d_in + d_out) + 2 k r + r."""
    total = 0
    for t in some:
        r, k = config.rank_at(t.path), config.outer_rank_at(t.d_in, t.d_out)
        total += k * (t.d_in + t.d_out) + 2 * k * r + r if r else 0
    return total


def lor2c(model: nn.Module, config: Any) -> int:
    """2 r d a path, (1 + paths) r d with one A for all, and the LoRA of layers that may give their path up."""
    anatomy = Anatomy(model, config.layers_pattern)
    layout = lay_out(config, model, anatomy, getattr(getattr(model, "config", None), "model_type", None))
    owners = [site for site in layout.layers.values() if site.owner]
    halves = 1 if config.share else 2
    paths = sum(halves * config.r * site.width for site in owners)
    if config.share:
        paths += sum(config.r * width for _, width in {(site.stack, site.width) for site in owners})
    linears = sum(config.lora_r * sum(features(model.get_submodule(path))) for path in layout.linears)
    return paths + linears


def count(model: nn.Module, config: Any) -> int:
    """Numbers that the adapter of `config` trains in `model`, without heads and biases.

    Raises:
        ConfigError: there is no formula for this kind of adapter, or the config doesn't fit the model.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "LOR2C":
        return lor2c(model, config)
    if kind not in FORMULAS:
        raise ConfigError(f"no formula for an adapter of PEFT method {kind}: it has to be built to be counted.")
    return FORMULAS[kind](targets(model, config), config)


#: PEFT type -> the formula. LoR2C's asks for the model itself.
FORMULAS: dict[str, Callable[[Iterable[Target], Any], int]] = {
    "MSPLORA": msplora,
    "LORA2": lora2,
    "LORA": lora,
    "DYLORA": dylora,
    "ADALORA": adalora,
    "VERA": vera,
    "LILY": lily,
    "ADAPTERDROP": adapter,
}
