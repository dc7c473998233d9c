"""A plan on the screen and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ziggurat.analysis.components import short_roles
from ziggurat.recipe.methods import shown

from .planner import Plan, variant_name

if TYPE_CHECKING:
    from rich.console import RenderableType


def size(count: float) -> str:
    """Bytes in words: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def to_json(plan: Plan) -> str:
    """The whole plan, with the memory's total."""
    values = asdict(plan)
    if plan.memory is not None:
        values["memory"] |= {"total": plan.memory.total, "formula": plan.memory.formula}
    return json.dumps(values, indent=1)


def show(plan: Plan) -> RenderableType:
    """Parts, comparison, disk and memory as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    named = shown(plan.method) + (f" r {plan.r}" if plan.r else "")
    parts = Table(title=f"{named} in {plan.model}: {len(plan.modules)} modules", title_justify="left")
    for name in ("part", "role"):
        parts.add_column(name, overflow="fold")
    for name in ("pairs", "rank", "layers per pair", "parameters"):
        parts.add_column(name, justify="right")
    short = short_roles(part.role for part in plan.parts)
    stacks = {part.stack for part in plan.parts}
    for number, part in enumerate(plan.parts):
        last = number + 1 == len(plan.parts) or plan.parts[number + 1].part != part.part
        role = short[part.role] + (f" of {part.stack}" if len(stacks) > 1 else "")
        cells = (part.part, role, str(part.pairs), str(part.rank), str(part.shared_by), f"{part.parameters:,}")
        parts.add_row(*cells, end_section=last)
    parts.add_row("adapter", "", "", "", "", f"{plan.adapter:,}", style="bold")
    beside = Table(title="Compared with other methods", title_justify="left")
    beside.add_column("method")
    for name in (f"at r {plan.r}" if plan.r else "", "relative size", "rank for its parameters", "which are"):
        beside.add_column(name, justify="right")
    whole = f"{plan.adapter / plan.base:.3%} of the model" if plan.base else ""
    beside.add_row(named, f"{plan.adapter:,}", "100%", "", whole, style="bold", end_section=True)
    for method in dict.fromkeys(b.method for b in plan.beside):
        at = {b.kind: b for b in plan.beside if b.method == method}
        same, paid = at.get("r"), at.get("budget")
        cells = [f"{same.parameters:,}", f"{same.parameters / plan.adapter:.0%}"] if same else ["", ""]
        cells += [str(paid.r), f"{paid.parameters:,}"] if paid else ["over budget", ""]
        beside.add_row(variant_name(method), *cells)
    lines = [f"base model: {plan.base:,} parameters; the adapter's file: {plan.file:,} bytes ({size(plan.file)})"]
    if plan.head:
        lines.append(f"trained whole beside the adapter (head): {plan.head:,}")
    m = plan.memory
    if m is not None:
        activations = size(m.activations) if m.activations is not None else "unknown"
        lines += [
            f"training memory at batch {m.batch}, length {m.length}: {size(m.total)} = weights {size(m.weights)} + "
            f"trained {size(m.trained)} + gradients {size(m.gradients)} + AdamW {size(m.optimizer)} + activations "
            f"{activations}",
            f"activations: {m.formula}; not in it: the device's context, workspaces, fragmentation",
        ]
    if (t := plan.tenants) is not None:
        lines.append(
            f"{t.number} adapters as a set: {t.shared:,} parameters ({', '.join(t.tiers)}; {size(t.bank)}) once, "
            f"{t.private:,} ({size(t.each)}) for each: {size(t.bank + t.number * t.each)} instead of "
            f"{size(t.number * t.alone)}"
        )
    lines += [f"note: {note}" for note in plan.notes]
    return Group(*([parts] if plan.parts else []), beside, *(Text(line) for line in lines))
