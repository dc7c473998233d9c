"""`ziggurat eval`: scores of an adapter, or of a model without one, on tasks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ziggurat.errors import RecipeError, StorageError
from ziggurat.files.staging import check_writable, write_whole
from ziggurat.nearest import missing_path
from ziggurat.terminal import Console, say

if TYPE_CHECKING:
    from ziggurat.evaluation.subject import Subject

_HELP = "Adapter folder; or a model without adapter: its folder, .gguf file or name on the hub."


def evaluate(
    adapter: Annotated[str, typer.Argument(help=_HELP)],
    tasks: Annotated[
        str | None, typer.Option(help="mmlu,bbh,drop,humaneval, glue/<task>, or any text task of lm-eval.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Without --tasks: a labelled file of your own, in the form of the run's data. "
            "With --tasks: folder of local parquet, one folder a task; else the hub."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task (a subject of MMLU is a task).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time (batch size).")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Model without adapter: dtype of its weights (auto, float32, bfloat16, float16).")
    ] = "auto",
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="HumanEval and its like: let code that the model writes run.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="GLUE: folder for the files of GLUE's server, from the test split.")
    ] = None,
    keep_tasks: Annotated[
        Path | None, typer.Option(help="Folder to leave the task files of --data in, for stock lm_eval.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the scores to.")] = None,
) -> None:
    """Score a trained adapter on a labelled file of your own; or an adapter, or a model without one, on tasks."""
    if tasks is None:
        _check_no_tasks(dtype, predictions, keep_tasks, run_code=run_generated_code)
        return score_file(adapter, data, limit=limit, batch=batch, out=out)
    from ziggurat.recipe.recipe import SPELLINGS

    dtype = SPELLINGS["dtype"].get(dtype, dtype)
    glue, lm_tasks = _read_tasks(tasks)
    _check_options(glue, dtype, limit, predictions, None if lm_tasks else keep_tasks)
    out, predictions, keep_tasks = (path and path.expanduser() for path in (out, predictions, keep_tasks))
    _check_out(out, predictions and predictions / "x.tsv", keep_tasks and keep_tasks / "x.yaml")
    _check_needs(glue, lm_tasks)
    from ziggurat.evaluation.lm import score
    from ziggurat.evaluation.ready import ready
    from ziggurat.evaluation.subject import load_subject

    subject = _find(adapter, glue, lm_tasks, dtype, data, server=predictions is not None)
    scores, errors, per_cent = dict[str, dict[str, float]](), dict[str, dict[str, float]](), dict[str, list[str]]()
    with ExitStack() as stack:
        how: dict[str, Any] = {"data": data, "limit": limit, "run_code": run_generated_code, "keep": keep_tasks}
        prepared = stack.enter_context(ready(lm_tasks, **how)) if lm_tasks else []
        model, tokenizer, loaded = load_subject(subject, dtype)
        for name in glue:
            scores |= _glue(loaded, name, data, limit, predictions)
        per_cent |= {task: [name for name in values if not name.endswith(_PLAIN)] for task, values in scores.items()}
        for scored in score(model, tokenizer, prepared, limit=limit, batch=batch) if lm_tasks else ():
            scores[scored.task] = {**scored.scores, "rows": float(scored.rows)}
            per_cent[scored.task], errors[scored.task] = list(scored.per_cent), scored.errors
            say(_scores(scored.task, scores[scored.task], per_cent[scored.task], scored.errors))
    key = "model" if subject.kind == "base" else "adapter"
    _write(out, {key: adapter, "scores": scores, "per_cent": per_cent, "standard_errors": errors})


def _check_out(out: Path | None, *others: Path | None) -> None:
    """Raise StorageError unless these files can be written, and `out` at most in the place of earlier scores."""
    for file in filter(None, (out, *others)):
        check_writable(file)
    if out is None or not out.exists() or not out.stat().st_size:
        return
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or "scores" not in content:
        raise StorageError(f"'{out}' exists and holds no scores of this command; name another file by --out")


def _write(out: Path | None, values: dict[str, Any]) -> None:
    """Write scores into a file, if one is named. Raises StorageError."""
    if out is not None:
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_whole(out, text, then="The scores stand above; nothing was changed there.")


def score_file(adapter: str, file: Path | None, *, limit: int | None, batch: int, out: Path | None) -> None:
    """`ziggurat eval ADAPTER --data FILE`. Raises RecipeError for folders that `ziggurat train` didn't write."""
    from dataclasses import asdict

    from ziggurat.evaluation.own import read_file, score_rows
    from ziggurat.evaluation.subject import find_subject
    from ziggurat.training.answers.load import load_adapter_model
    from ziggurat.training.loop.report import class_table

    if file is None:
        raise typer.BadParameter("nothing to score on: give --data FILE, a labelled file of your own, or --tasks")
    out = out and out.expanduser()
    _check_out(out)
    subject = find_subject(adapter)
    if subject.recipe is None or subject.head is None:
        if not Path(adapter).expanduser().exists():
            raise RecipeError(f"adapter folder {missing_path(adapter)}")
        raise RecipeError(
            f"--data: a file is scored in the form of the run's data, and '{adapter}' was not written by "
            "`ziggurat train`; --tasks scores other adapters and models"
        )
    table, notes = read_file(subject.recipe, subject.head, file, limit)
    scored = score_rows(load_adapter_model(adapter), file, table, notes, batch=batch)
    for note in scored.notes:
        say(f"note: {note}")
    for name, value in scored.scores.items():
        digits, sign = (2, "%") if name in scored.per_cent else (4, "")
        interval = scored.intervals.get(name)
        spread = f"  (95% interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
        say(f"{name} {value:.{digits}f}{sign}{spread}")
    say(f"rows {scored.rows:,}")
    if scored.by_class:
        Console().print(class_table(scored.by_class), highlight=False)
    _write(out, {"adapter": adapter, "data": str(file), **asdict(scored)})


def _read_tasks(tasks: str) -> tuple[list[str], list[str]]:
    """The names in `--tasks`: GLUE's, and those for lm-eval."""
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("--tasks names none")
    glue = [name for name in names if name.startswith("glue/")]
    return glue, [name for name in names if name not in glue]


def _check_no_tasks(dtype: str, predictions: Path | None, keep_tasks: Path | None, *, run_code: bool) -> None:
    """Raise BadParameter for options that need --tasks, which must not be ignored silently."""
    values = {"--predictions": predictions, "--keep-tasks": keep_tasks, "--run-generated-code": run_code}
    named = [name for name, value in values.items() if value] + ["--dtype"] * (dtype != "auto")
    if named:
        raise typer.BadParameter(f"{', '.join(named)}: for --tasks only; name tasks, or leave it out")


def _check_options(
    glue: list[str], dtype: str, limit: int | None, predictions: Path | None, unused: Path | None
) -> None:
    if unused is not None:
        raise typer.BadParameter("--keep-tasks: GLUE's tasks have no task files; name one of lm-eval, or leave it out")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype {dtype}: auto, float32, bfloat16 or float16")
    if predictions is not None and not glue:
        raise typer.BadParameter("--predictions is for glue/<task>")
    if predictions is not None and limit is not None:
        raise typer.BadParameter(
            "--limit leaves rows out, and GLUE's server wants them all; drop it with --predictions"
        )


def _find(
    adapter: str, glue: list[str], lm_tasks: list[str], dtype: str, data: Path | None, *, server: bool
) -> Subject:
    """The subject to score, checked against the tasks and their data before a model is loaded."""
    from ziggurat.evaluation.ready import check_folder
    from ziggurat.evaluation.subject import check_tasks, find_subject

    check_folder(data)
    subject = find_subject(adapter)
    check_tasks(subject, [*glue, *lm_tasks])
    if dtype != "auto" and subject.kind != "base":
        raise typer.BadParameter("--dtype is for a model without adapter; an adapter's base has the dtype of its run")
    for name in glue:
        from ziggurat.evaluation.glue import check_data

        assert subject.recipe is not None
        folder = str(data) if data is not None else subject.recipe.data.folder
        check_data(name.removeprefix("glue/"), folder, server=server)
    if subject.kind == "base":
        say(f"{adapter}: a model without adapter")
    return subject


def _check_needs(glue: list[str], lm_tasks: list[str]) -> None:
    """Raises MissingExtraError that names all packages that the tasks need and that are missing."""
    from ziggurat.evaluation.glue import needs
    from ziggurat.extras import require
    from ziggurat.recipe.glue import GLUE

    # Unknown names are reported when the names are read.
    names = [name for name in (task.removeprefix("glue/") for task in glue) if name in GLUE]
    packages = [package for name in names for package in needs(name)]
    require("ziggurat eval", *packages, *(["lm-eval"] if lm_tasks else []))


#: GLUE's scores that aren't percentages.
_PLAIN = ("rows", "rmse")


def _glue(
    loaded: Any, name: str, data: Path | None, limit: int | None, predictions: Path | None
) -> dict[str, dict[str, float]]:
    """The scores of one task, which are printed; empty if GLUE's server computes them."""
    from ziggurat.evaluation.glue import glue_scores, task_of, write_server_files

    folder = str(data) if data is not None else loaded.recipe.data.folder
    task = task_of(loaded, name.removeprefix("glue/"))
    if predictions is not None:
        files = write_server_files(loaded, task, predictions, folder)
        say(f"{name}: written {', '.join(map(str, files))}")
        return {}
    scores = glue_scores(loaded, task, folder, limit)
    say(_scores(name, scores, list(scores)))
    return {name: scores}


def _scores(task: str, scores: dict[str, float], per_cent: list[str], errors: dict[str, float] | None = None) -> str:
    """Percentages with two digits, other scores with four, as in lm-eval's table; with standard errors."""

    shown = []
    for name, value in scores.items():
        if name.endswith("rows"):
            continue
        digits = 2 if name in per_cent else 4
        error = f" ± {errors[name]:.{digits}f}" if errors and name in errors else ""
        shown.append(f"{name} {value:.{digits}f}{error}")
    return f"{task}: {', '.join(shown)} ({int(scores['rows']):,} rows)"
