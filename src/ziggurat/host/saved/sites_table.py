"""The sites of an adapter as a table in its adapter_config.json, so that its folder alone tells where it acts.

{stack: {"path": its path in the base model, "layers": how many, role: "<d_out>x<d_in>", ...}}. A parameter with all
experts of a layer is written with their number: "<experts>*<d_out>x<d_in>". A role that isn't in every layer is
followed by a colon and the numbers of its layers. The role "(around)" is the residual stream around layers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.host.site import Site, with_experts
from ziggurat.host.values import MOST_ENTRIES, MOST_RANK, is_whole, shown
from ziggurat.lowrank.spans import Span

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


def _site(path: str, stack: str, layer: int, depth: int, role: str, d_in: int, d_out: int) -> Site:
    if role == AROUND:
        return Site(f"{path}.{layer}", stack, layer, depth, "", d_in, d_out, span=Span(layer, layer))
    if not role:
        return Site(path, stack, layer, depth, "", d_in, d_out)
    return Site(f"{path}.{layer}.{role}", stack, layer, depth, role, d_in, d_out)
