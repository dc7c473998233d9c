"""A small part of benchmarks/crash_campaign.py: real commands, killed by SIGKILL and resumed, bitwise the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "crash_campaign.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks, and this system can't")
def test_killed_runs_resume_to_the_very_same_adapter() -> None:
    words = ["--kills", "3", "--methods", "lor2c", "--seed", "3", "--out", "-"]
    done = subprocess.run([sys.executable, str(CAMPAIGN), *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 faults" in done.stdout and "3 kills, " in done.stdout
