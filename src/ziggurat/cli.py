"""The `ziggurat` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from ziggurat.analysis.command import analyze, report
from ziggurat.doctor.command import doctor
from ziggurat.errors import ExportError, ZigguratError
from ziggurat.plan.command import plan, suggest

app = typer.Typer(
    name="ziggurat",
    help="Multi-scale low-rank fine-tuning: train by a recipe, predict, export, merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_DEBUG = "--debug"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ziggurat {version('ziggurat')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the whole traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE KEY=VALUE",
            help="A recipe file or the name of one that ships, and values that replace its own.",
        ),
    ] = None,
) -> None:
    """Fine-tune a model. Without an argument: the embedded model on the embedded data, in a few minutes, offline."""
    from ziggurat.training.recipe import load_recipe

    given = list(words or [])
    names = [word for word in given if "=" not in word or Path(word).is_file()]
    if len(names) > 1:
        raise typer.BadParameter(f"one recipe at a time, not {' and '.join(names)}; values are written key=value")
    recipe = load_recipe(names[0] if names else "default", [word for word in given if word not in names])

    from ziggurat.training.interrupt import Interrupted
    from ziggurat.training.report import show
    from ziggurat.training.run import resume_command
    from ziggurat.training.run import train as run

    console = Console()
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {recipe.task} with {recipe.method['name']} on {escape(recipe.model)}",
        highlight=False,
    )
    try:
        result = run(recipe, console=console)
    except Interrupted as stopped:
        _plain(f"{stopped}.")
        if stopped.checkpoint is None:
            _plain("There is no checkpoint to go on from; the same command starts afresh.")
        else:
            _plain(f"The checkpoint lies in {stopped.checkpoint}")
            _plain(f"Go on with: {resume_command(given)}")
        raise typer.Exit(128 + stopped.signal) from None
    show(console, recipe, result)


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder that `ziggurat train` wrote.")],
    text: Annotated[str | None, typer.Argument(help="The text (or instruction).")] = None,
    second: Annotated[str | None, typer.Argument(help="The second text, for adapters that compare two.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A .txt file with a text a line, or a table with the columns the adapter was trained on."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer of an instruction-tuned model.")] = 256,
) -> None:
    """Ask a trained adapter."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give either a text or --file")

    from ziggurat.training.answer import predict as answer
    from ziggurat.training.answer import read_texts
    from ziggurat.training.load import load_adapter_model

    loaded = load_adapter_model(adapter)
    if file is not None:
        firsts, seconds = read_texts(file, loaded)
    else:
        firsts, seconds = [str(text)], [second] if second is not None else None
    for found in answer(loaded, firsts, seconds, max_new_tokens=tokens):
        _plain(found.to_json() if json else found.to_line(alone=file is None))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, to save and change it.")] = None,
) -> None:
    """List the recipes that ship, or print one."""
    from ziggurat.training.recipe import find_recipe, shipped
    from ziggurat.training.source import read_yaml

    if name is not None:
        _plain(find_recipe(name)[1].rstrip("\n"))
        return
    texts = shipped()
    width = max(len(one) for one in texts)
    for one, content in texts.items():
        _plain(f"{one:<{width}}  {read_yaml(content)[0].get('about', '')}")


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    serving: Annotated[
        bool, typer.Option("--serving", help="The form that PEFT, vLLM and llama.cpp all scale alike.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base model, where the adapter's own note of it is wrong.")
    ] = None,
) -> None:
    """Write an adapter as plain LoRA, which stock PEFT loads."""
    from ziggurat import export as exporting

    _free(out)
    if base is None and _from_a_run(adapter):
        from ziggurat.training.load import load_adapter_model

        loaded = load_adapter_model(adapter)
        written = exporting.export_model(_adapted(adapter, loaded.model), out, serving=serving)
        loaded.tokenizer.save_pretrained(str(out))
    else:
        written = exporting.export(adapter, out, serving=serving, base_model=base)
    _plain(f"plain LoRA of rank {written.rank} on {written.modules} linears written to {out}")
    if serving:
        _plain(f"serve it with --max-lora-rank {written.rank}")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, where the adapter's own note of it is wrong.")
    ] = None,
) -> None:
    """Merge an adapter into its model and write the whole model with its tokenizer."""
    from ziggurat import export as exporting

    _free(out)
    if base is None and _from_a_run(adapter):
        from ziggurat.training.load import load_adapter_model

        loaded = load_adapter_model(adapter)
        exporting.merge_model(_adapted(adapter, loaded.model), out, loaded.tokenizer)
    else:
        exporting.merge(adapter, out, base_model=base)
    if any(out.glob("modeling_*.py")):
        _plain(f"model with its paths written to {out}: load it with trust_remote_code=True, after reading its code")
    else:
        _plain(f"merged model written to {out}")


for command in (analyze, report, doctor, plan, suggest):
    app.command()(command)


@app.command(name="eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    tasks: Annotated[str, typer.Option(help="mmlu,bbh,drop,humaneval, glue/<task>, or any task of lm-eval.")],
    data: Annotated[Path | None, typer.Option(help="Folder of local parquet, one folder a task; else the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task (a subject of MMLU is a task).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts a device takes at once.")] = 8,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="HumanEval: let code that the model writes run here.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="GLUE: folder for the files of GLUE's server, from the test split.")
    ] = None,
    keep_tasks: Annotated[
        Path | None, typer.Option(help="Folder to leave the task files of --data in, for stock lm_eval.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the scores to.")] = None,
) -> None:
    """Score a trained adapter on tasks."""
    import json

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("--tasks names none")
    glue = [name for name in names if name.startswith("glue/")]
    rest = [name for name in names if name not in glue]
    if predictions is not None and not glue:
        raise typer.BadParameter("--predictions is for glue/<task>")
    model, tokenizer, loaded = _for_evaluation(adapter, wants_run=bool(glue))
    found: dict[str, dict[str, float]] = {}
    if glue:
        from ziggurat.evaluation.glue import glue_scores, task_of, write_server_files

        folder = str(data) if data is not None else loaded.recipe.data.folder
        for name in glue:
            task = task_of(loaded, name.removeprefix("glue/"))
            if predictions is not None:
                files = write_server_files(loaded, task, predictions, folder)
                _plain(f"{name}: written {', '.join(map(str, files))}")
            else:
                found[name] = glue_scores(loaded, task, folder, limit)
                _plain(_scores(name, found[name]))
    if rest:
        from ziggurat.evaluation.lm import evaluate as run

        for score in run(
            model, tokenizer, rest, data=data, limit=limit, batch=batch, run_code=run_generated_code, keep=keep_tasks
        ):
            found[score.task] = {**score.scores, "rows": float(score.rows)}
            _plain(_scores(score.task, found[score.task]))
    if out is not None:
        out.write_text(json.dumps({"adapter": str(adapter), "scores": found}, indent=2) + "\n", encoding="utf-8")


def _scores(task: str, scores: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if not name.endswith("rows"))
    return f"{task}: {shown} ({int(scores['rows']):,} rows)"


def _for_evaluation(adapter: Path, *, wants_run: bool) -> tuple[Any, Any, Any]:
    """Model and tokenizer of an adapter folder, and the whole of what `ziggurat train` left, if it did."""
    if wants_run or _from_a_run(adapter):
        from ziggurat.training.load import load_adapter_model

        loaded = load_adapter_model(adapter)
        return loaded.model, loaded.tokenizer, loaded
    from transformers import AutoTokenizer

    from ziggurat.host.folder import adapter_config, load_adapter, load_base

    model = load_adapter(adapter, load_base(adapter)).eval()
    home = adapter if (adapter / "tokenizer_config.json").is_file() else adapter_config(adapter).base_model_name_or_path
    return model, AutoTokenizer.from_pretrained(str(home)), None


@app.command()
def compare(
    table: Annotated[Path, typer.Argument(metavar="TABLE.yaml", help="Methods, tasks and seeds.")],
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time (default: one a GPU, or one).")] = None,
    engine: Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")] = "local",
    only_report: Annotated[
        bool, typer.Option("--only-report", help="Run nothing; write the tables and plots of what has been done.")
    ] = False,
) -> None:
    """Run methods by tasks by seeds, what is done never again, and write the table with differences and plots."""
    from ziggurat.compare.table import load_table

    read = load_table(table, out)

    from ziggurat.compare.fill import fill
    from ziggurat.compare.fill import report as write

    console = Console()
    filled = write(read) if only_report else fill(read, engine=engine, workers=workers, console=console)
    for line in filled.notes:
        _plain(f"note: {line}")
    done, total = len(filled.summary.lines), len(read.runs)
    _plain(f"{done} of {total} runs are done, {filled.taken} of them now; {len(filled.failed)} failed")
    _plain(f"written: {', '.join(str(path) for path in filled.files)}")
    if filled.stopped:
        _plain("stopped; the same command goes on from here")
        raise typer.Exit(130)
    if filled.failed:
        raise typer.Exit(1)


def _from_a_run(adapter: Path) -> bool:
    """Whether the folder's own recipe says how to rebuild its model, head and label names included."""
    return (adapter / "run.json").is_file() and (adapter / "recipe.yaml").is_file()


def _adapted(adapter: Path, model: Any) -> Any:
    if not hasattr(model, "peft_config"):
        raise ExportError(f"'{adapter}' holds a whole model, not an adapter: there is nothing to export or merge")
    return model


def _free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"'{out}' exists already; name another folder")


def main() -> NoReturn:
    """Entry point: mistakes of the user end in one clean line and exit code 2, faults of ours in exit code 1."""
    words = sys.argv[1:]
    debug = _DEBUG in words
    if not debug:
        import warnings

        # What the libraries will change in later versions is no news to somebody who trains a model.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        app(args=[word for word in words if word != _DEBUG], prog_name="ziggurat")
    except ZigguratError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        if debug:
            raise
        first = str(error).strip().splitlines()
        _fail(f"{type(error).__name__}: {first[0] if first else ''} (--debug shows where)", 1)
    raise SystemExit(0)


def _plain(line: str) -> None:
    typer.echo(line)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
