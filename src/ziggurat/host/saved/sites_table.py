"""The sites of an adapter as a table in its adapter_config.json, so that its folder alone tells where it acts.

{stack: {"path": its path in the base model, "layers": how many, role: "<d_out>x<d_in>", ...}}. A parameter with all
experts of a layer is written with their number: "<experts>*<d_out>x<d_in>". A role that isn't in every layer is
followed by a colon and the numbers of its layers. The role "(around)" is the residual stream around layers.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.host.method import Method, specs_of
from ziggurat.host.site import Site, with_experts
from ziggurat.host.values import MOST_ENTRIES, MOST_RANK, is_whole, shown
from ziggurat.lowrank.spans import Span

logger = logging.getLogger(__name__)

AROUND = "(around)"


def to_table(sites: Mapping[str, Site]) -> dict[str, dict[str, Any]] | None:
    """The table of `sites`; None if a path can't be rebuilt from stack, layer and role (a list that skips numbers)."""
    table: dict[str, dict[str, Any]] = {}
    layers: dict[tuple[str, str, str], list[int]] = {}
    for path, site in sites.items():
        outside = not site.role and site.span is None
        if not outside and not path.endswith(site.tail):
            return None
        entry = table.setdefault(site.stack, {"path": path if outside else site.stack_path})
        entry["layers"] = site.num_layers
        role = AROUND if site.span is not None else site.role
        shape = f"{site.num_experts}*{site.d_out}x{site.d_in}" if site.fused else f"{site.d_out}x{site.d_in}"
        layers.setdefault((site.stack, role, shape), []).append(site.layer)
    for (stack, role, shape), numbers in layers.items():
        everywhere = numbers == list(range(table[stack]["layers"]))
        text = shape if everywhere else f"{shape}:{','.join(map(str, numbers))}"
        before = table[stack].get(role)
        table[stack][role] = text if before is None else f"{before};{text}"
    return table


def from_table(table: Any) -> dict[str, Site]:
    """Path -> site, as `to_table` was given them.

    Raises:
        ConfigError: it isn't of that form.
    """
    try:
        sites: dict[str, Site] = {}
        for stack, entry in table.items():
            path, depth = entry["path"], entry["layers"]
            if not (isinstance(stack, str) and isinstance(path, str) and is_whole(depth, 1, MOST_RANK)):
                raise ValueError(f"stack {shown(stack)}")
            for role, text in entry.items():
                if role in ("path", "layers"):
                    continue
                for part in text.split(";"):
                    shape, _, numbers = part.partition(":")
                    experts, _, sides = shape.rpartition("*")
                    d_out, d_in = (int(side) for side in sides.split("x"))
                    for layer in map(int, numbers.split(",")) if numbers else range(depth):
                        site = _site(path, stack, layer, depth, role, d_in, d_out)
                        if experts:
                            site = replace(site, num_experts=int(experts))
                        sites[site.path] = site
                        if len(sites) > MOST_ENTRIES:
                            raise ValueError(f"more than {MOST_ENTRIES:,} sites")
        return with_experts(sites)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"sites={shown(table)} isn't the table that ziggurat writes ({error}): take it out of adapter_config.json."
        ) from error


def check_depth(method: Method, config: Any, sites: Mapping[str, Site]) -> None:
    """Compare the places that a saved adapter was trained at with `sites`, those that it has in this model.

    In a stack of another depth a method that shares by depth would give layers other tensors; places may be lacking.

    Raises:
        ConfigError: a site would get another tensor than it was trained with.
    """
    if config.read_sites is None or config.read_sites == config.sites:
        return
    try:
        trained = from_table(config.read_sites)
    except ConfigError:
        return  # whoever needs the table says so

    def tensors(site: Site) -> set[str]:
        return {spec.leaf(key) for key, spec in specs_of(method, config.at(site), site).items()}

    here = {(site.stack, site.layer, site.role): site for site in sites.values()}
    lacking = []
    for path, site in trained.items():
        now = here.get((site.stack, site.layer, site.role))
        if now is None:
            lacking.append(path)
        elif now.num_layers != site.num_layers and tensors(now) != tensors(site):
            raise ConfigError(
                f"this adapter was trained in {site.num_layers} layers {site.stack!r}, and this model has "
                f"{now.num_layers}: {method.card.shown} shares tensors by depth, so {path!r} would get others than it "
                "was trained with. Load it on a base of that depth. For a cut or a grown model write it as plain LoRA "
                "first (`ziggurat export`), whose tensors go by the layer's number."
            )
    if lacking:
        logger.warning(
            "this model lacks %d of the %d places that the adapter was trained at (%s%s); their tensors are left out.",
            *(len(lacking), len(trained), ", ".join(lacking[:2]), ", ..." if len(lacking) > 2 else ""),
        )


def _site(path: str, stack: str, layer: int, depth: int, role: str, d_in: int, d_out: int) -> Site:
    if role == AROUND:
        return Site(f"{path}.{layer}", stack, layer, depth, "", d_in, d_out, span=Span(layer, layer))
    if not role:
        return Site(path, stack, layer, depth, "", d_in, d_out)
    return Site(f"{path}.{layer}.{role}", stack, layer, depth, role, d_in, d_out)
