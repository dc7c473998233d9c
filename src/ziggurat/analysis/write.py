"""The output of `ziggurat analyze`: tables on the screen, CSV and JSON, figures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.errors import ConfigError
from ziggurat.extras import require
from ziggurat.terminal import no_formula

from . import experts, figures, measures, sharing, tiers, trace
from .components import Collected, short_roles

if TYPE_CHECKING:
    from rich.console import RenderableType


_OVERLAP = {"label": "mean cos² of the angles", "diagonal": False, "least": 0.1}
#: Name -> a measure of pairs of layers, and its style for `figures.layer_map`.
MAPS: dict[str, tuple[Callable[..., np.ndarray], dict[str, Any]]] = {
    "kl": (measures.kl_matrix, {"title": "KL divergence between spectra", "label": "KL(i || j)"}),
    "cosine": (
        measures.cosine_matrix,
        {"title": "Cosine of the updates", "label": "cosine", "centred": True, "diagonal": False, "least": 0.1},
    ),
    "overlap_input": (measures.overlap_matrix, {"title": "Overlap of the input subspaces", **_OVERLAP}),
    "overlap_output": (
        partial(measures.overlap_matrix, side="output"),
        {"title": "Overlap of the output subspaces", **_OVERLAP},
    ),
}


def summary(collected: Collected, k: int = measures.HALF) -> list[dict[str, Any]]:
    """A line for each part, role and stack: the number of components and the means of their measures.

    The experts of a layer are one role.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for component, line in zip(collected.components, measures.rows(collected, k), strict=True):
        groups.setdefault((component.part, component.stack, component.family), []).append(line)
    lines = []
    for (part, stack, role), group in groups.items():
        means = {
            name: measures.mean(line[name] for line in group)
            for name in ("norm", "m_eff", "effective_rank", "stable_rank", "rank", "m_eff_k")
        }
        parameters = sum(line["parameters"] for line in group)
        lines.append(
            {"part": part, "stack": stack, "role": role, "components": len(group), "parameters": parameters, **means}
        )
    return lines


def table(collected: Collected, k: int = measures.HALF) -> RenderableType:
    """The summary for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = summary(collected, k)
    stacks = list(dict.fromkeys(line["stack"] for line in lines))
    short = short_roles(collected.roles)
    shown = Table(title=f"{collected.source} ({collected.method})", title_justify="left")
    names = ["part", *(["stack"] if len(stacks) > 1 else []), "role"]
    for name in names:
        shown.add_column(name, overflow="fold")
    for name in ("pairs", "rank", "norm", "M_eff-k", "eff. rank", "stable rank"):
        shown.add_column(name, justify="right", no_wrap=True)
    for number, line in enumerate(lines):
        words = [line["part"], *([line["stack"]] if len(stacks) > 1 else []), short[line["role"]]]
        numbers = [str(line["components"]), f"{line['rank']:g}", _number(line["norm"], 3)]
        numbers += [f"{_number(line['m_eff'], 2)} (k {line['m_eff_k']:g})"]
        numbers += [_number(line["effective_rank"], 2), _number(line["stable_rank"], 2)]
        new_part = number + 1 == len(lines) or lines[number + 1]["part"] != line["part"]
        shown.add_row(*words, *numbers, end_section=new_part)
    between = [
        f"{line['part']} and {line['other']}{' of ' + line['stack'] if len(stacks) > 1 else ''}: "
        f"cosine {_number(line['cosine'], 2)}, smallest principal angle of the input subspaces "
        f"{_number(line['angle_input'], 0)}°, of the output subspaces {_number(line['angle_output'], 0)}°"
        for line in tiers.rows(collected)
    ]
    notes = [Text(f"note: {note}", style="yellow") for note in collected.notes]
    return Group(shown, *(Text(text) for text in [*between, *experts.sentences(collected)]), *notes)


def write(
    collected: Collected,
    out: str | Path,
    other: Collected | None = None,
    *,
    k: int = measures.HALF,
    pictures: bool = True,
    history: Sequence[Mapping[str, Any]] = (),
    beside: Sequence[Collected] = (),
) -> list[Path]:
    """Write components.csv, analysis.json (all measures, spectra and matrices) and the figures to the folder `out`.

    Methods with tiers get a tiers.csv, too: the similarity of each pair of tiers; adapters of experts an experts.csv.

    `history`: the log of its run; recorded spectra are drawn over the epochs. `beside`: as in `as_json`.

    Raises:
        ConfigError: `out` is a file; `other` has another depth.
        MissingExtraError: `pictures` is True, and matplotlib isn't installed.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder to write the analysis to.")
    if pictures:
        require("drawing figures", "matplotlib")
    text = json_text(collected, other, k=k, beside=beside)
    drawn = dict([*pictures_of(collected, other), *pictures_over_epochs(history)]) if pictures else {}
    paths = [folder / "components.csv", folder / "analysis.json"]
    own = [*paths, folder / "tiers.csv", folder / "experts.csv", *(folder / f"{name}.png" for name in drawn)]
    foreign = [path.name for path in own if path.exists()]
    if foreign and not paths[1].is_file():
        raise ConfigError(f"{folder} holds a {foreign[0]} that no analysis wrote: name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    paths[1].write_text(text + "\n", encoding="utf-8")  # first: by it a later analysis knows the folder
    _write_rows(paths[0], measures.rows(collected, k))
    if between := tiers.rows(collected):
        paths.append(folder / "tiers.csv")
        _write_rows(paths[-1], between)
    if of_experts := experts.rows(collected):
        paths.append(folder / "experts.csv")
        _write_rows(paths[-1], of_experts)
    from .style import styled

    for name, draw in drawn.items():
        with styled():
            path = folder / f"{name}.png"
            draw().figure.savefig(path)
            paths.append(path)
    return paths


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: no_formula(value) for name, value in row.items()} for row in rows)


def as_json(
    collected: Collected, other: Collected | None = None, *, k: int = measures.HALF, beside: Sequence[Collected] = ()
) -> dict[str, Any]:
    """Everything as plain values: components with spectra, matrices by stack, energies. NaN stays NaN.

    `beside`: further adapters of the same base, for their common energy.
    """
    lines = [
        {
            **measures.row(c, k),
            "group": c.group,
            "layers": list(c.layers),
            "singular_values": c.singular_values.tolist(),
        }
        for c in collected.components
    ]
    stacks = {
        stack: {
            **{name: measure(collected, stack=stack).tolist() for name, (measure, _) in MAPS.items()},
            "energy": measures.energy(collected, stack),
            **({"kl_difference": measures.kl_difference(collected, other, stack).tolist()} if other else {}),
        }
        for stack in collected.layers
        if any(c.stack == stack and c.layers for c in collected.of(collected.by_layer))
    }
    return {
        "source": collected.source,
        "method": collected.method,
        "against": other.source if other else None,
        "compared_by": collected.by_layer,
        "notes": list(collected.notes),
        "components": lines,
        "tiers": tiers.rows(collected),
        "experts": experts.rows(collected),
        "sharing": [vars(line) for line in sharing.shared(sharing.updates([collected, *beside]))],
        "stacks": stacks,
    }


def json_text(
    collected: Collected, other: Collected | None = None, *, k: int = measures.HALF, beside: Sequence[Collected] = ()
) -> str:
    """`as_json` as text; NaN, which JSON lacks, as null."""
    return json.dumps(_plain(as_json(collected, other, k=k, beside=beside)), indent=1, allow_nan=False)


def against(first: Collected, second: Collected) -> str:
    """A sentence about the adapter, of two, whose layers' spectra differ more.

    Raises:
        ConfigError: they have different depths.
    """
    difference = measures.kl_difference(first, second)
    off = difference[~np.eye(len(difference), dtype=bool)]
    off = off[np.isfinite(off)]
    if not len(off):
        return "There are no two layers with spectra to compare."
    less_redundant = first if off.mean() > 0 else second
    verdict = f"{less_redundant.source} repeats itself less from layer to layer"
    if abs(off.mean()) < 5e-5:  # shown as 0
        verdict = "both repeat themselves equally from layer to layer"
    return (
        f"KL between layers, {first.source} minus {second.source}: mean {off.mean():+.4f}, positive in "
        f"{(off > 0).mean():.0%} of the pairs of layers: {verdict}."
    )


def pictures_of(collected: Collected, other: Collected | None = None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> a function that draws the figure, for the figures that this adapter has."""
    depths = {s: n for s, n in collected.layers.items() if any(c.stack == s and c.layers for c in collected.components)}
    for stack, depth in depths.items():
        tail = f"-{stack.replace('.', '_')}" if len(depths) > 1 else ""
        yield f"pyramid{tail}", lambda stack=stack: figures.pyramid(collected, stack)
        yield f"energy{tail}", lambda stack=stack: figures.energy_bars(collected, stack)
        for value in ("effective_rank", "norm"):
            yield f"{value}{tail}", lambda stack=stack, value=value: figures.role_map(collected, None, value, stack)
        of_experts = list(experts.maps(collected, stack))
        for role, short in short_roles(of_experts).items():
            yield f"experts-{short}{tail}", lambda role=role, at=stack: figures.expert_maps(collected, role, at)[0]
        if depth < 2:
            continue
        for name, (measure, style) in MAPS.items():
            yield f"{name}{tail}", lambda m=measure, s=style, at=stack: figures.layer_map(m(collected, stack=at), **s)
        if other is not None:
            title = f"KL of {collected.source} minus {other.source}"
            yield (
                f"kl_difference{tail}",
                lambda stack=stack, title=title: figures.layer_map(
                    measures.kl_difference(collected, other, stack),
                    title,
                    f"positive: {collected.source} is less redundant",
                    centred=True,
                ),
            )
        if collected.adds_up:
            yield f"tiers{tail}", lambda stack=stack: figures.tier_map(collected, stack)
    yield "spectra", lambda: figures.spectrum_lines(collected)


def pictures_over_epochs(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The paper's Fig. 3 of a run that recorded spectra."""
    spectra = trace.top_values(history)
    if spectra:
        yield "epochs", lambda: figures.figure_3(spectra)[0]


def _number(value: float, digits: int) -> str:
    return "NaN" if math.isnan(value) else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    """`value` for JSON, with None in the place of NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
