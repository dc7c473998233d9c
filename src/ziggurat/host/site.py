"""A site: the place of one factor pair, with everything that a method may know of the model."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ziggurat.errors import ConfigError
from ziggurat.lowrank.spans import Span

#: The name of a residual path among the children of its layer. No method's prefix may be part of it.
CHILD = "residual_path"
#: A rank that is allowed however small the matrix is.
FREE_RANK = 256
#: An expert's number in the role of a linear layer, behind the name of the list (or dict) of experts.
EXPERT = re.compile(r"((?:^|\.)\w*experts?)\.(?:expert_)?(\d+)(?=\.)")


@dataclass(frozen=True)
class Site:
    """A linear layer, or the residual stream around a span of layers.

    `path`: of the linear layer, or of the span's last layer, in the base model.
    `stack`: the list of layers that it lies in, as `body_name` names it; outside every stack its own path.
    `layer`, `num_layers`: its layer, from 0, and the depth of the stack. `role`: its path inside the layer; "" for a
    span and outside every stack. `d_in`, `d_out`: the input and output size; for a span both are its width.
    `span`: the layers that a path goes around; None for a linear layer. `expert`, `num_experts`: which expert of its
    layer this is, and of how many; None where there are none. A parameter that holds all experts of a layer is one
    site, with `num_experts` and no `expert`.
    """

    path: str
    stack: str
    layer: int
    num_layers: int
    role: str
    d_in: int
    d_out: int
    span: Span | None = None
    expert: int | None = None
    num_experts: int | None = None

    @property
    def fused(self) -> bool:
        """Whether this is one parameter that holds a matrix for each of `num_experts` experts."""
        return self.num_experts is not None and self.expert is None

    @property
    def tail(self) -> str:
        """The part of the path behind that of the stack, in a model whose list of layers skips no number."""
        return f".{self.layer}.{self.role}" if self.role else f".{self.layer}"

    @property
    def stack_path(self) -> str:
        """The path of the stack in the base model."""
        return self.path.removesuffix(self.tail)

    @property
    def kind_of_experts(self) -> str:
        """`kind` without the expert's number, of an expert that is a linear layer of its own."""
        role = EXPERT.sub(r"\1", self.role, count=1)
        return f"{leaf_name(self.stack)}:{leaf_name(role)}:{self.d_out}x{self.d_in}"

    @property
    def kind(self) -> str:
        """Stack, role and shape, which sites that share a tensor have in common, as a part of the tensor's name."""
        return f"{leaf_name(self.stack)}:{leaf_name(self.role)}:{self.d_out}x{self.d_in}"


def check_room(config: Any, name: str, rank: int, site: Site, *, free: bool = False) -> None:
    """Raise ConfigError if `rank` is above the largest rank of the matrix at `site`.

    `name` names the rank in the error. `free`: a rank up to the larger side, or up to 256, is accepted. Adapters from a
    folder, and sums of adapters, aren't checked.
    """
    if config.stored_numbers is not None or config.any_rank:
        return
    most = max(site.d_in, site.d_out, FREE_RANK) if free else min(site.d_in, site.d_out)
    if rank > most:
        raise ConfigError(
            f"{name} is above the matrix: {site.path!r} maps {site.d_in} to {site.d_out}, so at most rank {most} "
            "has a meaning there. Lower it, or leave the module out by exclude_modules."
        )


def rank_fits(config: Any, site: Site) -> None:
    """Raise ConfigError if the rank is above the largest rank of the matrix at `site`."""
    check_room(config, f"r={config.r}", config.r, site)


def leaf_name(path: str) -> str:
    """`path` as part of a parameter's name, in which torch allows no dots."""
    return path.replace(".", "/")


def expert_in(role: str) -> int | None:
    """The number of the expert that a linear layer of this role is part of; None where its path names none."""
    match = EXPERT.search(role)
    return None if match is None else int(match[2])


def with_experts(sites: Mapping[str, Site]) -> dict[str, Site]:
    """`sites` with the number of the expert, of those that are linear layers in a list of experts."""
    matches = {path: match for path, site in sites.items() if (match := EXPERT.search(site.role)) and not site.fused}
    experts: dict[tuple[str, int, str], int] = {}
    for path, match in matches.items():
        key = (sites[path].stack, sites[path].layer, match[1])
        experts[key] = max(experts.get(key, 0), int(match[2]) + 1)
    numbered = {
        path: replace(site, expert=int(match[2]), num_experts=experts[site.stack, site.layer, match[1]])
        for path, match in matches.items()
        if (site := sites[path])
    }
    return {path: numbered.get(path, site) for path, site in sites.items()}


def body_prefix(model: nn.Module) -> str:
    """The path, with a dot, under which a transformers model with a head holds its body; "" where it is the body."""
    name = model.base_model_prefix if isinstance(model, PreTrainedModel) else ""
    return f"{name}." if name and name in model._modules else ""


def body_name(model: nn.Module, path: str) -> str:
    """`path` without the body's own name, so that an adapter fits the model with another head and without one."""
    return path.removeprefix(body_prefix(model))


def with_other_head(path: str, prefix: str, paths: Collection[str]) -> str:
    """`path` in this model, for an adapter that was saved with another head, or without one.

    `prefix`: this model's `body_prefix`. `paths`: the paths that it has.
    """
    if path in paths:
        return path
    if prefix and prefix + path in paths:
        return prefix + path
    shorter = path.partition(".")[2]
    return shorter if not prefix and shorter in paths else path
