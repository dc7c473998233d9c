"""Decisions as pure functions: hand-made spectra, one case for each criterion, and properties of any run of events."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.lowrank.spans import Span
from ziggurat.methods.lor2c.plan import Path, StackState, applied, decide, most_events, paths, schedule, score

SINGLE = {"s": StackState(tuple(Span(n, n) for n in range(4)))}

# mean 1, 2, 0.5, 3; top-1 share 0.4, 0.9, 0.8, 0.3; four values each.
SPECTRA = {
    Path("s", Span(0, 0)): torch.tensor([1.6, 0.8, 0.8, 0.8]),
    Path("s", Span(1, 1)): torch.tensor([7.2, 0.4, 0.2, 0.2]),
    Path("s", Span(2, 2)): torch.tensor([1.6, 0.2, 0.1, 0.1]),
    Path("s", Span(3, 3)): torch.tensor([3.6, 3.0, 2.7, 2.7]),
}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("mean", [1.0, 2.0, 0.5, 3.0]),
        ("energy", [0.4, 0.9, 0.8, 0.3]),
        ("sfs", [0.6, 0.1, 0.2, 0.7]),
        (
            "effective_rank",
            [math.exp(-sum(p * math.log(p) for p in row)) for row in
             [(0.4, 0.2, 0.2, 0.2), (0.9, 0.05, 0.025, 0.025), (0.8, 0.1, 0.05, 0.05), (0.3, 0.25, 0.225, 0.225)]],
        ),
    ],
)  # fmt: skip
def test_scores_are_what_the_table_says(criterion: str, expected: list[float]) -> None:
    scores = [score(spectrum, criterion, k=1) for spectrum in SPECTRA.values()]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("criterion", "merged", "injected"),
    [
        ("mean", (1, 2), 3),  # sums 3, 2.5, 3.5; largest 3
        ("energy", (2, 3), 1),  # sums 1.3, 1.7, 1.1; largest 0.9
        ("sfs", (1, 2), 1),  # sums 0.7, 0.3, 0.9; smallest 0.1
        ("effective_rank", (1, 2), 3),
    ],
)
def test_each_criterion_chooses_its_own(criterion: str, merged: tuple[int, int], injected: int) -> None:
    merge = decide("merge", SINGLE, SPECTRA, criterion, k=1)
    assert merge.merged == (Span(merged[0], merged[0]), Span(merged[1], merged[1]))
    assert merge.kept == Span(merged[0], merged[0])
    assert decide("inject", SINGLE, SPECTRA, criterion, k=1).injected == injected


def test_a_decision_keeps_every_score_and_says_why() -> None:
    merge = decide("merge", SINGLE, SPECTRA)
    assert list(merge.scores) == ["s[0]", "s[1]", "s[2]", "s[3]"]
    assert merge.candidates == pytest.approx({"s[0] + s[1]": 3.0, "s[1] + s[2]": 2.5, "s[2] + s[3]": 3.5})
    assert "s[1] and s[2] have the smallest sum of mean, 2.5" in merge.reason
    inject = decide("inject", SINGLE, SPECTRA, "sfs", k=1)
    assert inject.reason == "s[1] has the smallest sfs, 0.1"
    assert inject.to_json()["injected"] == 1


def test_the_richer_path_is_kept_if_asked() -> None:
    merge = decide("merge", SINGLE, SPECTRA, "energy", k=1, keep="richer")
    assert (merge.merged, merge.kept) == ((Span(2, 2), Span(3, 3)), Span(3, 3))
    assert decide("merge", SINGLE, SPECTRA, "energy", k=1, keep="lower").kept == Span(2, 2)
    assert decide("merge", SINGLE, SPECTRA, "mean", k=1, keep="richer").kept == Span(1, 1)


def test_a_merge_needs_neighbours_and_respects_the_longest_span() -> None:
    gap = {"s": StackState((Span(0, 0), Span(2, 2), Span(3, 3)), (1,))}
    merge = decide("merge", gap, SPECTRA, "mean")
    assert merge.merged == (Span(2, 2), Span(3, 3))
    long = {"s": StackState((Span(0, 1), Span(2, 3)))}
    spectra = {path: torch.ones(4) for path in paths(long)}
    assert decide("merge", long, spectra, max_span=4).merged == (Span(0, 1), Span(2, 3))
    refused = decide("merge", long, spectra, max_span=3)
    assert refused.stack == ""
    assert "at most 3 layers" in refused.reason
    assert applied(long, refused) == long


def test_only_single_paths_are_given_up() -> None:
    mixed = {"s": StackState((Span(0, 2), Span(3, 3)))}
    spectra = {Path("s", Span(0, 2)): 9 * torch.ones(4), Path("s", Span(3, 3)): torch.ones(4)}
    assert decide("inject", mixed, spectra).injected == 3
    assert decide("inject", {"s": StackState((Span(0, 2),))}, spectra).stack == ""


def test_stacks_compete_but_never_merge_with_each_other() -> None:
    two = {"encoder": StackState((Span(0, 0), Span(1, 1))), "decoder": StackState((Span(0, 0), Span(1, 1)))}
    spectra = {path: torch.full((4,), float(i)) for i, path in enumerate(paths(two), start=1)}
    merge = decide("merge", two, spectra)
    assert (merge.stack, list(merge.candidates)) == (
        "encoder",
        ["encoder[0] + encoder[1]", "decoder[0] + decoder[1]"],
    )
    assert decide("inject", two, spectra).stack == "decoder"


def test_ties_go_to_the_lowest_layer_and_zeros_are_no_trouble() -> None:
    zeros = {path: torch.zeros(4) for path in SPECTRA}
    for criterion in ("mean", "energy", "sfs", "effective_rank"):
        assert decide("merge", SINGLE, zeros, criterion, k=2).merged == (Span(0, 0), Span(1, 1))
        assert decide("inject", SINGLE, zeros, criterion, k=2).injected == 0


def test_the_schedule_is_the_formula() -> None:
    assert [event.step for event in schedule(4, 0, 1000)] == [round(k * 1000 / 16) for k in (1, 2, 3, 4)]
    both = schedule(4, 2, 1200)
    assert [event.step for event in both] == [50, 100, 150, 200, 250, 300]
    assert [event.kind for event in both] == ["merge", "inject", "merge", "merge", "inject", "merge"]
    assert schedule(0, 0, 100) == []


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5000))
def test_events_lie_in_the_first_quarter_in_order(merges: int, injections: int, total: int) -> None:
    events = schedule(merges, injections, total)
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert all(0 <= step <= round(total / 4) for step in steps)
    assert sum(event.kind == "merge" for event in events) == merges
    assert sum(event.kind == "inject" for event in events) == injections


@given(
    depth=st.integers(2, 9),
    kinds=st.lists(st.sampled_from(["merge", "inject"]), max_size=9),
    max_span=st.sampled_from([None, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_any_run_of_events_keeps_the_structure_sound(depth: int, kinds: list, max_span: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    structure = {"s": StackState(tuple(Span(n, n) for n in range(depth)))}
    for kind in kinds:
        spectra = {path: torch.rand(4, generator=generator).sort(descending=True).values for path in paths(structure)}
        decision = decide(kind, structure, spectra, "mean", max_span=max_span)
        before = structure["s"]
        structure = applied(structure, decision)
        after = structure["s"]
        assert len(after.spans) == len(before.spans) - bool(decision.stack)
        covered = sorted([layer for span in after.spans for layer in span.layers] + list(after.injected))
        assert covered == list(range(depth))
        assert all(max_span is None or span.length <= max_span for span in after.spans)


def test_the_most_events_a_structure_takes() -> None:
    assert most_events(SINGLE, None) == (3, 4)
    assert most_events(SINGLE, 2) == (2, 4)
    gap = {"s": StackState((Span(0, 1), Span(3, 3), Span(4, 4)))}
    assert most_events(gap, None) == (1, 2)
