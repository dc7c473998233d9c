"""Decides which of lm-eval's scores are fractions of 1, which become percentages. Others are unchanged."""

import re
from typing import Any

#: Fractions by their definition. The name alone isn't enough: SQuAD's `f1` goes from 0 to 100 already.
SHARES = re.compile(r"acc(_norm|_bytes|_mutual_info|_all)?|accuracy|exact_match|em|f1|mcc|pass[@_](at_)?\d+")
#: lm-eval's aggregations of fractions that give a fraction; a task's own function may compute anything.
KEEPING = ("mean", "nanmean", "f1", "matthews_corrcoef")


def is_share(metric: str, value: float, tasks: list[Any]) -> bool:
    """True if `value`, of `metric` over lm-eval's `tasks` (a group's, or one), is a fraction (Matthews: -1 to 1).

    lm-eval has no mark for it. The name must be one of `SHARES`, every task that has the metric must make it by one of
    `KEEPING`, and the value must lie in the range.
    """
    from lm_eval.api.registry import get_aggregation

    keeping = [get_aggregation(name) for name in KEEPING]
    ways = [task.aggregation().get(metric) for task in tasks]
    made = [way for way in ways if way is not None]
    return (
        bool(made) and SHARES.fullmatch(metric) is not None and all(way in keeping for way in made) and abs(value) <= 1
    )
