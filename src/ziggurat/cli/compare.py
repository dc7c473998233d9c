"""`ziggurat compare`: a table of runs."""

from pathlib import Path
from typing import Annotated

import typer

from ziggurat.terminal import Console, say


def compare(
    table: Annotated[Path, typer.Argument(metavar="TABLE.yaml", help="Methods, tasks and seeds.")],
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time (default: one per GPU, or one).")] = None,
    engine: Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")] = "local",
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Take the K-th of N parts of the runs, beside other programs.")
    ] = None,
    only_report: Annotated[
        bool, typer.Option("--only-report", help="Run nothing; write the tables and plots of the finished runs.")
    ] = False,
) -> None:
    """Run methods by tasks by seeds, each run once, and write the table with differences and plots."""
    from ziggurat.compare.table import load_table

    read = load_table(table, out)
    for line in read.notes:
        say(f"note: {line}")

    from ziggurat.compare.fill import fill
    from ziggurat.compare.fill import report as write

    console = Console()
    part = _shard(shard) if shard is not None else None
    filled = write(read) if only_report else fill(read, engine=engine, workers=workers, console=console, shard=part)
    for line in filled.notes:
        say(f"note: {line}")
    done, total = len(filled.summary.lines), len(read.runs)
    say(f"{done} of {total} runs are done, {filled.taken} of them now; {len(filled.failed)} failed")
    say(f"written: {', '.join(str(path) for path in filled.files)}")
    if filled.stopped:
        say("stopped; the same command goes on from here")
        raise typer.Exit(130)
    if filled.failed:
        raise typer.Exit(1)


def _shard(text: str) -> tuple[int, int]:
    k, sign, n = text.partition("/")
    if not (sign and k.isdecimal() and n.isdecimal()):
        raise typer.BadParameter(f"--shard {text}: K/N is needed, such as 1/4")
    return int(k), int(n)
