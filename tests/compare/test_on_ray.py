"""Runs on a local Ray cluster of two nodes: a failing one is told, a killed worker's run is taken up again."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glue_folder import write_glue
from test_fill import small

from ziggurat.compare import surroundings
from ziggurat.compare.engines import run_all
from ziggurat.compare.fill import fill
from ziggurat.training.folder.run_folder import RunFolder

ray: Any = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # Workers must import the tests' environment as it is, and write nothing about this machine anywhere.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own 15 would starve them beside other tests
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_killed_workers_run_is_taken_up_again(
    wide_bert: Path, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glue = write_glue(tmp_path / "glue", 8)
    methods = {
        "LoRA": {"method.name": "lora", "method.r": 2},
        "too many groups": {"method.name": "msplora", "method.num_groups": 9},
    }
    table = small(wide_bert, glue, tmp_path / "out", methods=methods, seeds=[1])
    good = next(run for run in table.runs if run.method == "LoRA")
    log = tmp_path / "out" / "logs" / f"{Path(good.recipe.folder).name}.log"
    killed: list[int] = []

    def kill_first_worker() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if log.is_file() and "on worker" in (text := log.read_text()):
                killed.append(int(text.split()[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_first_worker, daemon=True)
    killer.start()
    outcomes = {item.run.method: item for item in run_all(table.runs, tmp_path / "out", "ray")}
    killer.join(10)
    assert len(killed) == 1
    assert outcomes["LoRA"].status == "done" and outcomes["LoRA"].info is not None
    workers = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("on worker")]
    assert len(workers) == 2 and workers[0] == killed[0] != workers[1]
    failed = outcomes["too many groups"]
    assert failed.status == "failed" and "num_groups=9" in failed.error
    assert outcomes["LoRA"].where["hardware"]["cores"] and "commit" in failed.where

    # What Ray has done is done for every engine. Where it ran is the worker's to say, not this program's.
    monkeypatch.setattr(surroundings, "hardware", lambda: {"processor": "the driver's", "cores": 0})
    filled = fill(small(wide_bert, glue, tmp_path / "out", seeds=[1]), engine="ray")
    assert len(filled.summary.lines) == 1 and not filled.failed
    assert filled.summary.lines[0]["hardware"]["cores"] == os.cpu_count()


def test_ctrl_c_waits_for_the_checkpoints(wide_bert: Path, cluster: Any, tmp_path: Path) -> None:
    glue = write_glue(tmp_path / "glue", 8)
    train = {"max_steps": 100_000, "batch": 4, "evaluate": "never", "evaluate_before": False, "save": 50, "keep": 1}
    shared = {"model": str(wide_bert), "data.folder": str(glue), "method.target_modules": ["query"], "train": train}
    table = small(wide_bert, glue, tmp_path / "out", set=shared, seeds=[1])
    folder = RunFolder(table.runs[0].recipe)

    def step() -> int:
        checkpoint = folder.last_checkpoint()
        return int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0

    seen: list[int] = []

    def interrupt_soon() -> None:
        deadline = time.monotonic() + 240
        while step() == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(step())
        os.kill(os.getpid(), signal.SIGINT)

    # A program that was started in the background may have been told to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt_soon, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            list(run_all(table.runs, tmp_path / "out", "ray"))
    finally:
        signal.signal(signal.SIGINT, before)
    # The worker has stopped by now, at a step after the regular checkpoint's.
    assert not folder.lock.is_taken() and step() > seen[0] >= 50
