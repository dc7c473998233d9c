"""A table filled in processes: never twice, failures shown, stopped and gone on, killed and taken up again."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from glue_folder import write_glue
from rich.console import Console
from training_tables import reviews, write_csv

from ziggurat.compare.engines import run_all
from ziggurat.compare.fill import _alone, fill, report
from ziggurat.compare.table import Table, make_table
from ziggurat.errors import RecipeError
from ziggurat.training.folder.run_folder import RunFolder


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("data") / "glue", 8)


def small(model: Path, glue: Path, out: Path, **more: Any) -> Table:
    train = {"max_steps": 2, "batch": 4, "evaluate": "never", "save": "never"}
    values = {
        "set": {"model": str(model), "data.folder": str(glue), "train": train, "method.target_modules": ["query"]},
        "methods": {"LoRA": {"method.name": "lora", "method.r": 2}},
        "tasks": ["rte"],
        "seeds": [1, 2],
        **more,
    }
    return make_table(values, "small", out)


def test_a_run_with_one_answer_to_all_rows_stands_in_the_report(wide_bert: Path, tmp_path: Path) -> None:
    """A mean over seeds hides the one that has learned nothing."""
    train = write_csv(tmp_path / "train.csv", reviews(16))
    alike = write_csv(tmp_path / "alike.csv", [{**row, "text": "the film"} for row in reviews(12)])
    tasks = {"reviews": {"data.train": str(train), "data.validation": str(alike), "data.folder": None}}
    table = small(wide_bert, tmp_path, tmp_path / "out", tasks=tasks, seeds=[1])
    assert not fill(table).failed
    page = (tmp_path / "out" / "table.md").read_text()
    assert 'Runs that warned, and count in the scores:\n\n- LoRA on reviews, seed 1: the model answers "' in page


def csv(place: str | Path) -> dict[str, Any]:
    return {"data.train": str(place), "data.folder": None}


class PrintedAtOnce:
    """A console that writes into a file through a large buffer; what has arrived there before the first result."""

    def __init__(self, path: Path, results: Path) -> None:
        self.path, self.results = path, results
        self.console = Console(file=path.open("w", buffering=2**20))
        self.before_the_first_result: list[str] = []

    def __enter__(self) -> "PrintedAtOnce":
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while self.console is not None:
            lines = self.path.read_text().splitlines()
            if self.results.exists():
                return
            self.before_the_first_result = lines
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.console.file.close()
        self.watch.join(10)


def test_a_table_is_filled_once_and_a_failed_run_is_shown(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    methods = {
        "LoRA": {"method.name": "lora", "method.r": 2},
        "too many groups": {"method.name": "msplora", "method.num_groups": 9},
    }
    table = small(wide_bert, glue, tmp_path / "out", methods=methods, seeds=[1])
    with PrintedAtOnce(tmp_path / "printed", tmp_path / "out" / "results.jsonl") as printed:
        filled = fill(table, workers=2, console=printed.console)
    assert printed.before_the_first_result == [
        "2 of 2 runs to do; checking models, data and tasks",
        "[0 of 2] LoRA on rte, seed 1: started",
        "[0 of 2] too many groups on rte, seed 1: started",
    ]
    assert (filled.taken, len(filled.failed), filled.stopped) == (1, 1, False)
    log = Path(filled.failed[0]["log"])
    assert "num_groups=9" in filled.failed[0]["error"] and log.stat().st_mode & 0o111 == 0
    names = {path.name for path in filled.files}
    assert {"table.md", "table.csv", "scores.png", "scores.svg"} == names
    assert "too many groups on rte, seed 1: RecipeError" in (tmp_path / "out" / "table.md").read_text()

    lines = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    done = next(line for line in lines if line["status"] == "done")
    assert done["seed"] == 1 and done["recipe"]["data.train"] == "glue/rte" and done["hardware"]["cores"]
    assert done["score"] == done["after"]["accuracy"] and done["step_seconds"] > 0 and done["stored_bytes"] > 0
    assert done["versions"]["torch"] and "commit" in done

    good = small(wide_bert, glue, tmp_path / "out", seeds=[1])
    again = fill(good)
    assert (again.taken, len(again.summary.lines)) == (0, 1)
    assert report(good).summary.lines == again.summary.lines


def test_what_does_not_exist_is_found_once_before_the_first_run(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("review,label\ngood,1\nbad,0\n")
    methods = {
        "LoRA": {"method.name": "lora", "method.r": 2},
        "pyramid": {"method.name": "msplora"},
        "elsewhere": {"method.name": "lora", "tasks": {"rte": {"model": "./no-model"}}},
    }
    tasks: dict[str, Any] = {"rte": None, "own": csv(tmp_path / "mine.csv"), "gone": csv("./gone.csv")}
    with pytest.raises(RecipeError) as error:
        fill(small(wide_bert, glue, tmp_path / "out", methods=methods, tasks=tasks))
    assert [line.partition(";")[0].partition(": this folder")[0] for line in str(error.value).splitlines()] == [
        "the table 'small' has 3 problems:",
        "  model: './no-model' does not exist",
        f"  own: data.text: {tmp_path / 'mine.csv'} has no column 'text'",
        "  gone: data file './gone.csv' does not exist",
    ]
    assert not (tmp_path / "out" / "runs").exists()


def test_an_answer_may_be_larger_than_a_pipe_holds(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    names = ["a" * 50_000, "b" * 50_000]  # they stand in run.json, which the worker sends
    rows = "".join(f"{word} it,{names[number % 2]}\n" for number, word in enumerate(["like", "hate"] * 10))
    (tmp_path / "mine.csv").write_text(f"text,label\n{rows}")
    table = small(wide_bert, glue, tmp_path / "out", tasks={"own": csv(tmp_path / "mine.csv")}, seeds=[1])
    assert fill(table).taken == 1


def test_a_killed_run_is_told_and_taken_up_again(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    table = small(wide_bert, glue, tmp_path / "out", seeds=[1])

    def kill_it(run: object) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]

    outcomes = list(run_all(table.runs, tmp_path / "out", "local", 1, kill_it))
    assert [outcome.status for outcome in outcomes] == ["failed"] and "killed by SIGKILL" in outcomes[0].error
    assert fill(table).taken == 1


def test_a_stopped_run_goes_on_from_its_checkpoint(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    train = {"max_steps": 150, "batch": 4, "evaluate": "never", "save": 20}
    shared = {"model": str(wide_bert), "data.folder": str(glue), "method.target_modules": ["query"], "train": train}
    table = small(wide_bert, glue, tmp_path / "out", set=shared, seeds=[1])
    folder = RunFolder(table.runs[0].recipe)

    def stop_soon(run: object) -> None:
        child = multiprocessing.active_children()[0]

        def stop() -> None:
            deadline = time.monotonic() + 200
            while folder.last_checkpoint() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGTERM)  # type: ignore[arg-type]

        threading.Thread(target=stop, daemon=True).start()

    outcome = next(iter(run_all(table.runs, tmp_path / "out", "local", 1, stop_soon)))
    assert outcome.status == "stopped" and "of 150" in outcome.error
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None and 20 <= int(checkpoint.name.rpartition("-")[2]) < 150
    filled = fill(table)
    assert filled.taken == 1 and filled.summary.lines[0]["steps"] == 150
    # One history over both programs: the second took up the first one's.
    history = json.loads((folder.final / "run.json").read_text())["history"]
    assert [line["step"] for line in history if "loss" in line][:3] == [1, 10, 20]


def test_sigterm_stops_a_table_with_a_checkpoint_and_its_reports(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    """As a cluster's scheduler ends a job."""
    train = {"max_steps": 100_000, "batch": 4, "evaluate": "never", "evaluate_before": False, "save": 20, "keep": 1}
    shared = {"model": str(wide_bert), "data.folder": str(glue), "method.target_modules": ["query"], "train": train}
    table = small(wide_bert, glue, tmp_path / "out", set=shared, seeds=[1])
    folder = RunFolder(table.runs[0].recipe)

    ended = threading.Event()

    def stop() -> None:
        while folder.last_checkpoint() is None and not ended.wait(0.01):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    try:
        filled = fill(table)
    finally:
        ended.set()
    assert (filled.taken, filled.stopped, filled.failed) == (0, True, [])
    assert signal.getsignal(signal.SIGTERM) is before
    assert (table.folder / "table.md").exists() and folder.last_checkpoint() is not None
    assert not folder.lock.is_taken() and not multiprocessing.active_children()


def test_the_server_of_forks_outlives_sigterm() -> None:
    """A scheduler signals it too, and without it nobody could wait for a run's checkpoint."""
    code = (
        "import os, signal, time\n"
        "from multiprocessing import forkserver\n"
        "from ziggurat.compare.engines import Local\n"
        "context, server = Local(1).context, forkserver._forkserver._forkserver_pid\n"
        "os.kill(server, signal.SIGTERM)\n"
        "time.sleep(1)\n"
        "run = context.Process(target=time.sleep, args=(0,))\n"
        "run.start(), run.join()\n"
        "blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "print(os.waitpid(server, os.WNOHANG), run.exitcode, signal.SIGTERM in blocked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(0, 0) 0 False\n", done.stderr


def test_two_programs_do_not_fill_one_folder(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    import fcntl

    table = small(wide_bert, glue, tmp_path / "out")
    table.folder.mkdir(parents=True)
    with (table.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="another program is filling"):
            fill(table)
    with pytest.raises(RecipeError, match="'slurm' is not one of local, ray"):
        fill(table, engine="slurm")


def test_shards_fill_one_table_between_them(wide_bert: Path, glue: Path, tmp_path: Path) -> None:
    """As the tasks of an array job do, one after the other or at once."""
    table = small(wide_bert, glue, tmp_path / "out", seeds=[1, 2, 3])
    first = fill(table, shard=(1, 2))
    assert (first.taken, len(first.summary.lines)) == (2, 2)
    with _alone(table.folder, "1-of-2"):  # the other shard runs beside it; the whole table and the same shard don't
        second = fill(table, shard=(2, 2))
        for shard in (None, (1, 2)):
            with pytest.raises(RecipeError, match="another program is filling"):
                fill(table, shard=shard)
    assert (second.taken, len(second.summary.lines)) == (1, 3)
    assert {path.name for path in table.folder.glob("*.jsonl")} == {"results.1-of-2.jsonl", "results.2-of-2.jsonl"}
    whole = fill(table)
    assert (whole.taken, len(whole.summary.lines)) == (0, 3)
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(RecipeError, match=f"shard {shard[0]}/2: k/n with k from 1 to n"):
            fill(table, shard=shard)
