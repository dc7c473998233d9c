"""benchmarks/rewards_frontier.py: the plan's order, the choice of rates, and prompts that lie in one part alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rewards_frontier

    return rewards_frontier


def test_every_rate_is_tried_before_the_best_one_goes_on_with_other_seeds(frontier: Any) -> None:
    plan = yaml.safe_load((BENCHMARKS / "rewards_frontier.yaml").read_text())
    lines: list[dict[str, Any]] = []
    order = []
    while (run := next(frontier.missing(plan, lines), None)) is not None:
        order.append(run)
        failed = run.method == "LoR2C r 8"
        lines.append({"key": run.key, **({"error": "no"} if failed else {"tuning_after": run.rate})})
    names = list(plan["rates"])
    first = [run for run in order if run.task == "sums"]
    assert [run.method for run in first[: len(names)]] == names
    assert [run.rate for run in first[: len(names)]] == [rates[0] for rates in plan["rates"].values()]
    assert {run.seed for run in first[: 3 * len(names)]} == {0}
    assert [(run.method, run.rate, run.seed) for run in first[3 * len(names) :]] == [
        (name, max(plan["rates"][name]), seed) for seed in (1, 2) for name in names if name != "LoR2C r 8"
    ]


def test_no_prompt_lies_in_two_parts_and_the_parts_are_scored_apart(frontier: Any) -> None:
    plan = yaml.safe_load((BENCHMARKS / "rewards_frontier.yaml").read_text())
    for task, sizes in plan["sizes"].items():
        parts = frontier.prompts(task, sizes)
        asked = [row["prompt"] for rows in parts.values() for row in rows]
        assert len(asked) == len(set(asked)) == sum(sizes.values())
        assert parts["training"][0]["prompt"].count("+") == frontier.TASKS[task] - 1
    # A sign that Unicode calls a digit is none of a number.
    answers = [[{"role": "assistant", "content": f"It is {number}."}] for number in (7, 8, "7²")]
    asked = {"completions": answers, "answer": [7, 7, 7], "part": ["training", "reported", "reported"]}
    assert frontier.tuning(**asked) == [1.0, None, None] and frontier.reported(**asked) == [None, 0.0, 1.0]
