"""The commands `ziggurat analyze` and `ziggurat report`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ziggurat.errors import ExportError
from ziggurat.files.staging import told_of_storage, write_whole
from ziggurat.terminal import Console, say

from .options import Json


def analyze(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="Adapter folder: any method of ours, or PEFT's LoRA family; or a recipe (.yaml), for the gradients "
            "of its data before training.",
        ),
    ],
    against: Annotated[
        Path | None, typer.Option(help="A second adapter to compare its layers with (the paper's Fig. 4).")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Further adapters of the same base, to measure the part that all their updates share."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables (CSV, JSON) and figures.")] = None,
    k: Annotated[
        int, typer.Option("-k", min=0, help="Largest singular values that M_eff-k counts; 0: half of each rank.")
    ] = 0,
    json: Json = False,
) -> None:
    """Analyse an adapter: spectra, effective ranks, norms, and the similarity and common part of its layers."""
    from json import loads as parse

    from ziggurat.analysis import sharing, write
    from ziggurat.analysis.collect import collect
    from ziggurat.extras import install_command, missing

    if adapter.is_file() and adapter.suffix in (".yaml", ".yml"):
        return _gradients(adapter, json, {"--against": against, "--beside": beside, "--out": out, "-k": k})
    first = collect(adapter)
    others = [collect(folder) for folder in beside or ()]
    second = collect(against) if against is not None else None
    for folder in filter(None, [*(beside or ()), against]):
        _tell_of_bases(adapter, folder)
    if json:
        say(write.json_text(first, second, k=k, beside=others))
    else:
        console = Console()
        for collected in (first, second):
            if collected is not None:
                console.print(write.table(collected, k))
        if second is not None:
            console.print(write.against(first, second), highlight=False)
        for line in sharing.shared(sharing.updates([first, *others])):
            console.print(f"updates, {sharing.sentence(line)}", highlight=False)
    if out is not None:
        run = adapter / "run.json"
        history = parse(run.read_text(encoding="utf-8")).get("history") or [] if run.is_file() else []
        pictures = not missing(["matplotlib"])
        with told_of_storage(out, "The files that were written before it stay there."):
            paths = write.write(first, out, second, k=k, pictures=pictures, history=history, beside=others)
        if not pictures:
            how = install_command(["matplotlib"])
            say(f"note: no figures were drawn, as matplotlib is not installed: {how}", err=True)
        say(f"{len(paths)} files written to {out}: {', '.join(path.name for path in paths)}", err=json)


def _tell_of_bases(adapter: Path, other: Path) -> None:
    """A note if the configs of two adapters name different base models."""
    from ziggurat.host.saved.folder import adapter_config

    first, second = (adapter_config(folder).base_model_name_or_path for folder in (adapter, other))
    if first != second:
        say(
            f"note: {adapter} was trained on {first} and {other} on {second}: unless that is one model under two "
            "names, what they have in common means nothing",
            err=True,
        )


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
    follow: Annotated[
        bool, typer.Option("--follow", help="A run in training: print its log, and keep a page of its curves.")
    ] = False,
) -> None:
    """Write one HTML page, without network, about one run or several."""
    from ziggurat.analysis.page import report as page

    if follow:
        if len(runs) != 1:
            raise typer.BadParameter(f"--follow watches one run at a time, not {len(runs)}")
        runs = [_follow(runs[0], out)]
    _write(out, page(runs))


def _write(out: Path, text: str, tell: bool = True) -> None:
    """Write a page; only an older page is overwritten. Raises ExportError."""
    head = text.partition("<title>")[0]
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(head.encode())):
        raise ExportError(f"'{out}' exists and is no report of this command; name another file by --out")
    write_whole(out, text)
    if tell:
        say(f"{out}: {len(text.encode()) // 1024 + 1} KiB")


def _follow(run: Path, out: Path) -> Path:
    """Print a run's log and update its page until it is finished; returns its folder. ConfigError if it vanishes."""
    import time

    from ziggurat.analysis.live import live_page, places_of, read_progress
    from ziggurat.training.callbacks.progress import line_of

    printed: list[str] = []
    written = False
    while True:
        final, work = places_of(run)
        if not work.is_dir():
            return final
        lines = read_progress(work)
        new = [text for text in map(line_of, lines) if text not in printed]
        for text in new:
            say(text)
        if new or not written:
            _write(out, live_page(final, lines), tell=not written)
        printed, written = printed + new, True
        time.sleep(_EVERY)


#: The polling interval of a followed run, in seconds.
_EVERY = 1.0


def _gradients(recipe: Path, as_json: bool, options: Mapping[str, object]) -> None:
    """Print how alike the layers' gradients are before training; `options` go with adapters and must be left out."""
    from json import dumps

    from ziggurat.analysis import sharing
    from ziggurat.plan.gradients import gradients_of

    if named := [option for option, value in options.items() if value]:
        raise typer.BadParameter(f"{', '.join(named)}: for an adapter only; a recipe's gradients are printed")
    lines = sharing.shared(gradients_of(recipe))
    say(dumps([vars(line) for line in lines], indent=1) if as_json else "gradients before training")
    for line in () if as_json else lines:
        say(f"  {sharing.sentence(line)}")
