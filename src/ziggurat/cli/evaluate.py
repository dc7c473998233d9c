"""`ziggurat eval`: an adapter's scores on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ziggurat.host.staging import check_writable, write_whole

from .folder import from_a_run


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
    # Scoring takes hours; a place that takes no file is to be known before.
    for place in (out, predictions and predictions / "x.tsv", keep_tasks and keep_tasks / "x.yaml"):
        if place is not None:
            check_writable(place)
    model, tokenizer, loaded = _for_evaluation(adapter, wants_run=bool(glue))
    found: dict[str, dict[str, float]] = {}
    if glue:
        from ziggurat.evaluation.glue import glue_scores, task_of, write_server_files

        folder = str(data) if data is not None else loaded.recipe.data.folder
        for name in glue:
            task = task_of(loaded, name.removeprefix("glue/"))
            if predictions is not None:
                files = write_server_files(loaded, task, predictions, folder)
                typer.echo(f"{name}: written {', '.join(map(str, files))}")
            else:
                found[name] = glue_scores(loaded, task, folder, limit)
                typer.echo(_scores(name, found[name]))
    if rest:
        from ziggurat.evaluation.lm import evaluate as run

        for score in run(
            model, tokenizer, rest, data=data, limit=limit, batch=batch, run_code=run_generated_code, keep=keep_tasks
        ):
            found[score.task] = {**score.scores, "rows": float(score.rows)}
            typer.echo(_scores(score.task, found[score.task]))
    if out is not None:
        text = json.dumps({"adapter": str(adapter), "scores": found}, indent=2) + "\n"
        write_whole(out, text, then="The scores stand above; nothing was changed there.")


def _scores(task: str, scores: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if not name.endswith("rows"))
    return f"{task}: {shown} ({int(scores['rows']):,} rows)"


def _for_evaluation(adapter: Path, *, wants_run: bool) -> tuple[Any, Any, Any]:
    """Model and tokenizer of an adapter folder, and the whole of what `ziggurat train` left, if it did."""
    if wants_run or from_a_run(adapter):
        from ziggurat.training.load import load_adapter_model

        loaded = load_adapter_model(adapter)
        return loaded.model, loaded.tokenizer, loaded
    from transformers import AutoTokenizer

    from ziggurat.host.bars import without_bars
    from ziggurat.host.folder import adapter_config, load_adapter, load_base

    with without_bars():
        model = load_adapter(adapter, load_base(adapter)).eval()
    home = adapter if (adapter / "tokenizer_config.json").is_file() else adapter_config(adapter).base_model_name_or_path
    return model, AutoTokenizer.from_pretrained(str(home), trust_remote_code=False), None
