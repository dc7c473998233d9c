"""Spans of layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.errors import ConfigError
from ziggurat.lowrank.spans import Span, check_spans


@given(num_layers=st.integers(1, 40), data=st.data())
def test_any_cut_of_the_depth_is_accepted(num_layers: int, data: st.DataObject) -> None:
    firsts = sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1)))
    spans = [(a, b - 1) for a, b in zip(firsts, [*firsts[1:], num_layers], strict=True)]
    checked = check_spans(spans, num_layers)
    assert [tuple(span) for span in checked] == spans
    assert sum(span.length for span in checked) == num_layers - firsts[0]


def test_spans_may_leave_layers_out_and_come_from_json() -> None:
    assert check_spans([[0, 2], [4, 4]], 6) == [Span(0, 2), Span(4, 4)]
    assert check_spans([], 6) == []


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 6)], r"spans\[0\]=\(0, 6\): needs 0 <= first <= last <= 5, the stack has 6 layers"),
        ([(-1, 0)], "needs 0 <= first"),
        ([(2, 1)], "needs 0 <= first <= last"),
        ([(0, 2), (2, 3)], r"spans\[1\]=\(2, 3\) comes after \(0, 2\)"),
        ([(3, 4), (0, 1)], "order spans by depth"),
        ([(0, 1), (0, 1)], "without overlap"),
        ([(0,)], r"spans\[0\]=\(0,\): a span is two layer numbers"),
        ([(0, 1, 2)], "two layer numbers"),
        ([3], "two layer numbers"),
        ([("0", "1")], "two layer numbers"),
        ([(0, 1.0)], "two layer numbers"),
        ([(False, True)], "two layer numbers"),
        ([(0, 3)], r"covers 4 layers: at most 3"),
    ],
)
def test_bad_spans(spans: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_spans(spans, 6, max_length=3 if "at most 3" in message else None)


def test_joining() -> None:
    assert Span(0, 1).joined(Span(2, 4)) == Span(0, 4)
    assert list(Span(2, 4).layers) == [2, 3, 4]
    for other in (Span(3, 4), Span(1, 2), Span(0, 0)):
        with pytest.raises(ConfigError, match="the second must start at 2"):
            Span(0, 1).joined(other)
