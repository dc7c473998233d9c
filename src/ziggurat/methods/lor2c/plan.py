"""The choice of paths to merge or to replace by plain LoRA, and its schedule: pure functions of spectra and structure.

Symbols: a path has the singular values s_1 >= ... >= s_r of B A, and covers a span of layers. Every decision keeps all
scores it was made from, and its reason.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ziggurat.lowrank.spans import Span
from ziggurat.lowrank.spectrum import effective_rank, top_k_share
from ziggurat.methods.lor2c.structure import Path, StackState, Structure, paths

Kind = Literal["merge", "inject"]
CRITERIA = ("mean", "energy", "sfs", "effective_rank")
KEEP = ("lower", "richer")


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
        return float(effective_rank(spectrum))
    share = float(top_k_share(spectrum, k))
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
    candidates: dict[tuple[Path, ...], float]
    if kind == "merge":
        best, extreme = min, "smallest"
        candidates = {pair: scores[pair[0]] + scores[pair[1]] for pair in _neighbours(structure, max_span)}
        limit = "" if max_span is None else f" of at most {max_span} layers together"
        lack = f"no two adjacent paths{limit} remain"
    else:
        # By sfs an even spectrum counts as settled; by the others a high score marks the layer that needs more.
        best, extreme = (min, "smallest") if criterion == "sfs" else (max, "largest")
        candidates = {(path,): value for path, value in scores.items() if path.span.length == 1}
        lack = "every remaining path covers several layers"
    named = {str(path): value for path, value in scores.items()}
    compared = {" + ".join(map(str, candidate)): value for candidate, value in candidates.items()}
    if not candidates:
        return Decision(kind, f"nothing to {kind}: {lack}", named, compared)
    chosen = best(candidates, key=candidates.__getitem__)
    value = f"{candidates[chosen]:.4g}"
    if kind == "inject":
        (path,) = chosen
        reason = f"{path} has the {extreme} {criterion}, {value}"
        return Decision(kind, reason, named, compared, path.stack, injected=path.span.first)
    lower, upper = chosen
    kept = upper if keep == "richer" and float(spectra[upper].sum()) > float(spectra[lower].sum()) else lower
    reason = f"{lower} and {upper} have the {extreme} sum of {criterion}, {value}; "
    reason += f"the joint path keeps the weights of {kept}"
    return Decision(kind, reason, named, compared, lower.stack, (lower.span, upper.span), kept.span)


def _neighbours(structure: Structure, max_span: int | None) -> Iterator[tuple[Path, Path]]:
    """The pairs of adjacent paths that may merge."""
    for stack, state in structure.items():
        for lower, upper in pairwise(state.spans):
            if upper.first == lower.last + 1 and (max_span is None or lower.length + upper.length <= max_span):
                yield Path(stack, lower), Path(stack, upper)


def applied(structure: Structure, decision: Decision) -> dict[str, StackState]:
    """The structure after `decision`."""
    if not decision.stack:
        return dict(structure)
    spans, injected = structure[decision.stack].spans, structure[decision.stack].injected
    if decision.merged is not None:
        lower, upper = decision.merged
        spans = tuple(lower.joined(upper) if span == lower else span for span in spans if span != upper)
    elif decision.injected is not None:
        spans = tuple(span for span in spans if span.first != decision.injected)
        injected = tuple(sorted((*injected, decision.injected)))
    return {**structure, decision.stack: StackState(spans, injected)}


def most_events(structure: Structure, max_span: int | None) -> tuple[int, int]:
    """The most merges, and the most injections, that `structure` could take if there were none of the other kind."""
    merges = sum(len(state.spans) - _fewest(state.spans, max_span) for state in structure.values())
    return merges, sum(span.length == 1 for state in structure.values() for span in state.spans)


def _fewest(spans: Sequence[Span], max_span: int | None) -> int:
    """The fewest paths that `spans` can become when neighbours merge and no joint span may exceed `max_span` layers."""
    count, end, length = 0, -2, 0
    for span in spans:
        length += span.length
        if span.first > end + 1 or (max_span is not None and length > max_span):
            count, length = count + 1, span.length
        end = span.last
    return count
