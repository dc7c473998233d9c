"""Fill a table: start the runs that it lacks, note each result at once, write the reports."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from ziggurat.errors import MissingExtraError, RecipeError
from ziggurat.extras import require
from ziggurat.files.staging import told_of_storage, write_whole
from ziggurat.recipe.needs import needs

from .engines import Outcome, check_engine, run_all
from .inputs import check_inputs
from .live import LiveTable
from .plot import draw
from .report import markdown, table_csv
from .results import Results, failed_line, line_of
from .summary import Summary, summarise
from .table import Run, Table

#: Seconds that a shard waits for others to take their locks.
PATIENCE = 10


@dataclass(frozen=True)
class Filled:
    """The result of filling a table: its summary, how many runs finished, those that failed, the files written."""

    summary: Summary
    taken: int
    failed: list[dict[str, Any]]
    files: list[Path]
    stopped: bool = False
    notes: list[str] = field(default_factory=list)


def fill(
    table: Table,
    *,
    engine: str = "local",
    workers: int | None = None,
    console: Console | None = None,
    shard: tuple[int, int] | None = None,
) -> Filled:
    """Start the runs that the table lacks; then write table.md, table.csv and the plots into its folder.

    `shard`: (k, n), run only the k-th of n equal parts of the runs (k from 1), beside other programs that run the
    others; the reports include the results of all of them so far.

    A finished run, by the key of its resolved recipe, is never repeated; a failed run is tried again. Ctrl-C and
    SIGTERM stop the running ones with a checkpoint, and the same call resumes them.

    Raises:
        MissingExtraError: packages that one of the runs, its evaluation or the engine needs aren't installed.
        RecipeError: another program is filling the folder or the shard; there is no such engine or shard; models, files
            or columns of the runs don't exist (all are named, each once); lm-eval knows no such task.
        DataError: lm-eval's data can't be read.
    """
    check_engine(engine)
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise RecipeError(f"shard {shard[0]}/{shard[1]}: k/n with k from 1 to n, such as 1/4.")
    console = console or Console(quiet=True)
    advice = "Finished runs are in their folders; make room, and the same command goes on from there."
    name = "-of-".join(map(str, shard)) if shard else ""
    with told_of_storage(table.folder, advice), _alone(table.folder, name):
        results = Results(table.folder, name)
        # Two cells of a table may be the same run, which is made once.
        runs = list({run.key: run for run in table.runs}.values())
        share = runs[shard[0] - 1 :: shard[1]] if shard else runs
        todo = [run for run in share if not results.done(run.key)]
        require(f"filling the table {table.name}", *_needs(todo, engine))
        with LiveTable(table, results, console) as live, _stopped_by_sigterm():
            live.say(f"{len(todo)} of {len(table.runs)} runs to do; checking models, data and tasks")
            check_inputs(table.name, todo)
            taken, stopped = 0, False
            outcomes = run_all(todo, table.folder, engine, workers, live.started)
            try:
                for outcome in outcomes:
                    _note(table, results, outcome)
                    taken += outcome.status == "done"
                    live.ended(outcome)
                    if stopped := outcome.status == "stopped":
                        break
            except KeyboardInterrupt:
                stopped = True
            finally:
                outcomes.close()
        return _written(table, results, taken, stopped)


def _needs(todo: list[Run], engine: str) -> list[str]:
    """The packages outside the core that the runs, their scores and the table's intervals need."""
    trained = [package for run in todo if run.trains for package in needs(run.recipe)]
    scored = ["lm-eval" for run in todo if run.evaluation is not None and run.evaluation.lm_tasks]
    return [*trained, "scipy", *scored, *(["ray"] if engine == "ray" else [])]


def report(table: Table) -> Filled:
    """Write the reports from the finished runs; starts none. Raises MissingExtraError without scipy."""
    return _written(table, Results(table.folder), 0, False)


def _written(table: Table, results: Results, taken: int, stopped: bool) -> Filled:
    summary = summarise(table, results.of(table))
    failed = results.failed(table)
    files, notes = [], []
    for name, text in (("table.md", markdown(summary, failed)), ("table.csv", table_csv(summary))):
        files.append(table.folder / name)
        write_whole(files[-1], text)
    try:
        with told_of_storage(table.folder):
            files += draw(summary, table.folder)
    except MissingExtraError as error:
        notes.append(str(error))
    return Filled(summary, taken, failed, files, stopped, notes)


def _note(table: Table, results: Results, outcome: Outcome) -> None:
    if outcome.status == "done":
        assert outcome.info is not None
        results.add(line_of(outcome.run, outcome.info, outcome.where))
        if not table.keep_adapters:
            shutil.rmtree(outcome.run.recipe.folder, ignore_errors=True)
    elif outcome.status == "failed":
        results.add(failed_line(outcome.run, outcome.error, outcome.log, outcome.where))


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which clusters end a job, stops the block as Ctrl-C does. Signals reach only the main thread."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _alone(folder: Path, shard: str) -> Iterator[None]:
    """Hold the folder's lock: two programs at once would train the same runs into the same folders.

    A shard holds its own lock, and the folder's only while it acquires it; other shards wait for this moment. The whole
    table takes the folder's lock and those of all shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as held:
            whole = FileLock(folder / ".lock", timeout=PATIENCE if shard else 0)
            whole.acquire()
            held.callback(whole.release)
            parts = [folder / f".lock.{shard}"] if shard else sorted(folder.glob(".lock.*-of-*"))
            for part in parts:
                held.enter_context(FileLock(part, blocking=False))
            if shard:
                whole.release()
            yield
    except Timeout as error:
        raise RecipeError(f"another program is filling '{folder}'; wait for it, or name another --out") from error
