"""The choice of paths to merge or to replace by plain LoRA, and its schedule: pure functions of spectra and structure.

Symbols: a path has the singular values s_1 >= ... >= s_r of B A, and covers a span of layers. Every decision keeps all
scores it was made from, and its reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ziggurat.lowrank.spans import Span
from ziggurat.lowrank.spectrum import effective_rank, top_k_share

Kind = Literal["merge", "inject"]
CRITERIA = ("mean", "energy", "sfs", "effective_rank")
KEEP = ("lower", "richer")


@dataclass(frozen=True)
class StackState:
    """The paths of one stack: the spans they cover, in order of depth, and the layers that have plain LoRA instead."""

    spans: tuple[Span, ...]
    injected: tuple[int, ...] = ()


Structure = Mapping[str, StackState]
"""Stack -> its state."""


class Path(NamedTuple):
    """A path by its place: the stack and the span that it covers."""

    stack: str
    span: Span

    def __str__(self) -> str:
        first, last = self.span
        layers = f"{first}" if first == last else f"{first}-{last}"
        return f"{self.stack}[{layers}]"


@dataclass(frozen=True)
class Decision:
    """One event, decided.

    `stack`: where; "" if nothing could be done. `merged`: the two spans that become one. `kept`: the one of them whose
    weights are kept. `injected`: the layer whose path is replaced. `scores`: of every path, by `str(Path)`.
    `candidates`: the compared candidates, with their values. `reason`: in words.
    """

    kind: Kind
    reason: str
    scores: dict[str, float]
    candidates: dict[str, float]
    stack: str = ""
    merged: tuple[Span, Span] | None = None
    kept: Span | None = None
    injected: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dicts and numbers."""
        plain = json.loads(json.dumps(asdict(self)))  # which makes lists of tuples
        return {key: value for key, value in plain.items() if value not in (None, "")}


class Event(NamedTuple):
    """An event and the optimiser step before which it happens, counted from 0."""

    step: int
    kind: Kind


def schedule(merges: int, injections: int, total_steps: int) -> list[Event]:
    """Event k of n at step round(k T / (4 n)): spread evenly over the first quarter of T steps.

    With both kinds, n is their sum and each kind is spread evenly among the n, merges first.
    """
    kinds: list[Kind] = ["merge", "inject"]
    places = [((i + 0.5) / count, which) for which, count in enumerate((merges, injections)) for i in range(count)]
    n = len(places)
    return [
        Event(round(k * total_steps / (4 * n)), kinds[which]) for k, (_, which) in enumerate(sorted(places), start=1)
    ]


def score(spectrum: Tensor, criterion: str, k: int) -> float:
    """The score of a path by the singular values of its B A.

    ================  ====================================================================
    mean              mean of all singular values (as in the reference scripts)
    energy            the k largest singular values' share of the sum
    sfs               1 - that share: how evenly the spectrum is spread
    effective_rank    exp of the entropy of the normalised singular values
    ================  ====================================================================

    A path of zeros scores 0, by sfs 1.
    """
    if criterion == "mean":
        return float(spectrum.mean())
    if criterion == "effective_rank":
        return float(effective_rank(spectrum)) if spectrum.sum() > 0 else 0.0
    share = float(top_k_share(spectrum, min(k, len(spectrum)))) if spectrum.sum() > 0 else 0.0
    return share if criterion == "energy" else 1.0 - share


def decide(
    kind: Kind,
    structure: Structure,
    spectra: Mapping[Path, Tensor],
    criterion: str = "mean",
    k: int = 1,
    keep: str = "lower",
    max_span: int | None = None,
) -> Decision:
    """Decide the next event of `kind`. `spectra` has the singular values of every path of `structure`."""
    scores = {path: score(spectra[path], criterion, k) for path in paths(structure)}
    if kind == "merge":
        return _merge(structure, spectra, scores, criterion, keep, max_span)
    return _inject(structure, scores, criterion)


def paths(structure: Structure) -> list[Path]:
    """Every path, stack by stack, in order of depth."""
    return [Path(stack, span) for stack, state in structure.items() for span in state.spans]


def applied(structure: Structure, decision: Decision) -> dict[str, StackState]:
    """The structure after `decision`."""
    after = dict(structure)
    if not decision.stack:
        return after
    state = after[decision.stack]
    if decision.merged is not None:
        lower, upper = decision.merged
        spans = tuple(lower.joined(upper) if span == lower else span for span in state.spans if span != upper)
        after[decision.stack] = StackState(spans, state.injected)
    elif decision.injected is not None:
        gone = Span(decision.injected, decision.injected)
        injected = tuple(sorted((*state.injected, decision.injected)))
        after[decision.stack] = StackState(tuple(span for span in state.spans if span != gone), injected)
    return after


def most_events(structure: Structure, max_span: int | None) -> tuple[int, int]:
    """How many merges, and how many injections, `structure` could take at most if there were none of the other kind."""
    merges = sum(len(state.spans) - _fewest(state.spans, max_span) for state in structure.values())
    return merges, sum(span.length == 1 for state in structure.values() for span in state.spans)


def _merge(
    structure: Structure,
    spectra: Mapping[Path, Tensor],
    scores: dict[Path, float],
    criterion: str,
    keep: str,
    max_span: int | None,
) -> Decision:
    sums: dict[tuple[Path, Path], float] = {}
    for stack, state in structure.items():
        for lower, upper in pairwise(state.spans):
            adjacent = upper.first == lower.last + 1
            if adjacent and (max_span is None or lower.length + upper.length <= max_span):
                pair = (Path(stack, lower), Path(stack, upper))
                sums[pair] = scores[pair[0]] + scores[pair[1]]
    candidates = {f"{lower} + {upper}": value for (lower, upper), value in sums.items()}
    named = _by_name(scores)
    if not sums:
        limit = "" if max_span is None else f" of at most {max_span} layers together"
        return Decision("merge", f"nothing to merge: no two adjacent paths{limit} are left", named, candidates)
    lower, upper = min(sums, key=sums.__getitem__)
    kept = lower
    if keep == "richer" and float(spectra[upper].sum()) > float(spectra[lower].sum()):
        kept = upper
    reason = (
        f"{lower} and {upper} have the smallest sum of {criterion}, {sums[lower, upper]:.4g}; "
        f"the joint path keeps the weights of {kept}"
    )
    return Decision("merge", reason, named, candidates, lower.stack, (lower.span, upper.span), kept.span)


def _inject(structure: Structure, scores: dict[Path, float], criterion: str) -> Decision:
    single = {path: scores[path] for path in paths(structure) if path.span.length == 1}
    candidates = _by_name(single)
    named = _by_name(scores)
    if not single:
        return Decision("inject", "nothing to inject: every path left covers several layers", named, candidates)
    # By sfs an even spectrum counts as settled; by the others a high score marks the layer that needs more.
    chosen = (min if criterion == "sfs" else max)(single, key=single.__getitem__)
    extreme = "smallest" if criterion == "sfs" else "largest"
    reason = f"{chosen} has the {extreme} {criterion}, {single[chosen]:.4g}"
    return Decision("inject", reason, named, candidates, chosen.stack, injected=chosen.span.first)


def _by_name(scores: Mapping[Path, float]) -> dict[str, float]:
    return {str(path): value for path, value in scores.items()}


def _fewest(spans: Sequence[Span], max_span: int | None) -> int:
    """The fewest paths that `spans` can become when neighbours merge and no joint span may exceed `max_span` layers."""
    count, end, length = 0, -2, 0
    for span in spans:
        length += span.length
        if span.first > end + 1 or (max_span is not None and length > max_span):
            count, length = count + 1, span.length
        end = span.last
    return count
