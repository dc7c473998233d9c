"""Trainer's own search for hyper-parameters: the examples of docs/search.md as they stand. `.ci/clients` runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


def blocks() -> list[str]:
    return re.findall(r"```python no-run\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_searches_rank_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    code = blocks()[0]
    names: dict[str, Any] = {"__name__": "search_page"}
    exec(compile(code, str(PAGE), "exec"), names)
    best = names["best"]
    assert set(best.hyperparameters) == {"learning_rate", "r"} and best.objective > 0
    states = sorted(Path("search").glob("run-*/checkpoint-*/trainer_state.json"))
    steps = [json.loads(state.read_text())["global_step"] for state in states]
    assert all(step == 20 for step in steps)


@pytest.mark.skipif(os.environ.get("ZIGGURAT_CLIENT") != "search", reason="no Ray of its own: .ci/clients")
def test_ray_takes_optunas_place(tmp_path: Path) -> None:
    first, second = blocks()
    code = "import json; json.dump([best.hyperparameters, best.objective], open('best.json', 'w'))"
    # One worker and no dashboard: Ray gives its agents 15 seconds to start.
    start = "import ray\nray.init(num_cpus=1, include_dashboard=False)\n"
    program = first.partition("best = trainer")[0] + start + second + code
    (tmp_path / "program.py").write_text(program)
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    chosen, objective = json.loads((tmp_path / "best.json").read_text())
    assert set(chosen) == {"learning_rate", "r"} and chosen["r"] in (4, 8) and objective > 0
