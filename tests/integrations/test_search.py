"""Trainer's own search for hyper-parameters: the example of docs/search.md as it stands. `.ci/clients` runs it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


def test_the_example_searches_rank_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python no-run\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "search_page"}
    exec(compile(code, str(PAGE), "exec"), names)
    best = names["best"]
    assert set(best.hyperparameters) == {"learning_rate", "r"} and best.objective > 0
    states = sorted(Path("search").glob("run-*/checkpoint-*/trainer_state.json"))
    steps = [json.loads(state.read_text())["global_step"] for state in states]
    assert all(step == 20 for step in steps)
