"""The number of parameters that a method trains, from shapes alone: no adapter is built.

A registered method's number follows from its `tensors`. PEFT's own methods have a formula each. Symbols: a linear layer
maps d_in to d_out; r is the rank.
"""

from collections.abc import Callable, Iterable
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host import count as registered
from ziggurat.host.base.targets import target_sites
from ziggurat.host.experts.sites import parameter_sites
from ziggurat.host.method import method_of
from ziggurat.host.site import Site


def lora(some: Iterable[Site], config: Any) -> int:
    """sum r (d_in + d_out), r by the rank pattern; DoRA: plus a magnitude for each output, d_out.

    A parameter that holds all experts of a layer has a pair for each of them.
    """
    pattern = config.rank_pattern or {}
    total = 0
    for t in some:
        r = pattern.get(get_pattern_key(list(pattern), t.path), config.r)
        experts = t.num_experts or 1 if t.fused else 1
        total += experts * r * (t.d_in + t.d_out) + (t.d_out if config.use_dora else 0)
    return total


def adalora(some: Iterable[Site], config: Any) -> int:
    """sum r (d_in + d_out) + r with the initial rank r."""
    return sum(config.init_r * (t.d_in + t.d_out + 1) for t in some)


def vera(some: Iterable[Site], config: Any) -> int:
    """sum r + d_out: the two vectors of each linear layer; the random factors aren't trained."""
    return sum(config.r + t.d_out for t in some)


def lily(some: Iterable[Site], config: Any) -> int:
    """sum over groups of num_B r d_out + ceil(n / stride_A) r d_in + n num_B r.

    A group is the n linear layers of one target and one shape: they share their experts B, `stride_A` neighbours
    share one A, and each has a router of its own.
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


def count(model: nn.Module, config: Any) -> int:
    """Trainable parameters of the adapter of `config` in `model`, without heads and biases.

    Raises:
        ConfigError: there is no formula for this kind of adapter, or the config doesn't fit the model.
    """
    if method_of(config) is not None:
        return registered.count(model, config)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in FORMULAS:
        raise ConfigError(f"no formula for an adapter of PEFT method {kind}: it has to be built to be counted.")
    config = registered.with_targets(config, model)
    sites = target_sites(config, model) if config.target_modules else {}
    if parameters := getattr(config, "target_parameters", None):
        if getattr(config, "use_dora", False):
            raise ConfigError("PEFT's DoRA adapts no parameters of experts: take target_parameters out.")
        sites |= parameter_sites(config, model)
    if not sites and not parameters:
        raise ConfigError(
            f"target_modules={config.target_modules!r} matches no linear layer of {type(model).__name__}."
        )
    return FORMULAS[kind](sites.values(), config)


#: PEFT type -> the formula.
FORMULAS: dict[str, Callable[[Iterable[Site], Any], int]] = {
    "LORA": lora,
    "ADALORA": adalora,
    "VERA": vera,
    "LILY": lily,
}
