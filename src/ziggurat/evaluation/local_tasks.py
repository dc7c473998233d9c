"""MMLU, BBH, DROP and HumanEval from local parquet files, as task files for stock lm-eval too.

The data lie in `<data>/<task>/`, in these columns:

    mmlu       test, dev         subject, question, choices, answer
    bbh        test              task, input, target;  cot_prompts: task, prompt
    drop       validation        passage, question, answers
    humaneval  test              task_id, prompt, entry_point, test

`write_tasks` writes YAML files (and splits MMLU and BBH into their parts), so that `lm_eval --include_path FOLDER
--tasks ziggurat_mmlu` runs exactly what `ziggurat eval` runs. Prompts, ends and lengths of answers, and their
extraction, which are in local_tasks.yaml, are those of lm-eval's own tasks of these names (BBH: `bbh_cot_fewshot`);
docs/evaluation.md lists the exceptions.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ziggurat.errors import DataError
from ziggurat.files.staging import told_of_storage, write_whole
from ziggurat.nearest import missing_path
from ziggurat.training.data.tables import read_table, require_column

PREFIX = "ziggurat_"
#: Shots of the papers' table.
SHOTS = {"mmlu": 5, "bbh": 3, "drop": 3, "humaneval": 0}
#: DROP's own em and F1 are lm-eval's; the file gives stock lm-eval a way to them.
_DROP_HELPERS = "from lm_eval.tasks.drop.utils import process_results\n\n__all__ = ['process_results']\n"
#: A tag of lm-eval, which YAML dumpers don't write.
_DROP_RESULTS = "process_results: !function drop_helpers.process_results\n"


def write_tasks(names: list[str], data: Path, folder: Path) -> dict[str, str]:
    """Write the task files of `names` into `folder`; name -> the name of its task or group for lm-eval.

    Raises DataError for missing files or columns, StorageError if the task files can't be written.
    """
    makers = {"mmlu": _mmlu, "bbh": _bbh, "drop": _drop, "humaneval": _humaneval}
    for name in names:
        makers[name](data.expanduser().resolve() / name, folder.resolve())
    return {name: PREFIX + name for name in names}


def _mmlu(data: Path, folder: Path) -> None:
    columns = ("subject", "question", "choices", "answer")
    tables = {split: _read(data / f"{split}.parquet", columns) for split in ("test", "dev")}
    subjects = sorted(set(tables["test"]["subject"]))
    shots = Counter(tables["dev"]["subject"])
    few = [subject for subject in subjects if shots[subject] < SHOTS["mmlu"]]
    if few:
        raise DataError(f"{data / 'dev.parquet'} has fewer than the {SHOTS['mmlu']} shots of {', '.join(few)}")
    for split, table in tables.items():
        file = data / f"{split}.parquet"
        _check_rows(file, table["choices"], "choices", "four choices", lambda choices: len(choices) == 4)
    for subject in subjects:
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        parts = {split: _where(table, "subject", subject) for split, table in tables.items()}
        _write_part(folder, "mmlu", subject, parts, num_fewshot=SHOTS["mmlu"], description=about)
    _write_group(folder, "mmlu", subjects, metric="acc")


def _bbh(data: Path, folder: Path) -> None:
    test = _read(data / "test.parquet", ("task", "input", "target"))
    prompts = _read(data / "cot_prompts.parquet", ("task", "prompt"))
    by_task = dict(zip(prompts["task"], prompts["prompt"], strict=True))
    tasks = sorted(set(test["task"]))
    missing = [task for task in tasks if task not in by_task]
    if missing:
        raise DataError(f"{data / 'cot_prompts.parquet'} has no prompt of {', '.join(missing)}")
    for task in tasks:
        # The published prompt has its three worked examples after a line that warns crawlers.
        prompt = str(by_task[task]).partition("-----\n")[2] or str(by_task[task])
        description = "{% raw %}" + prompt.strip() + "{% endraw %}\n\n"
        _write_part(folder, "bbh", task, {"test": _where(test, "task", task)}, description=description)
    _write_group(folder, "bbh", tasks, metric="exact_match", filter_list=["get-answer"])


def _drop(data: Path, folder: Path) -> None:
    file = data / "validation.parquet"
    table = _read(file, ("passage", "question", "answers"))
    _check_rows(file, table["answers"], "answers", "a list of answers", lambda answers: bool(answers) and all(answers))
    if len(table) <= SHOTS["drop"]:
        raise DataError(f"{file} has {len(table)} rows; a question needs {SHOTS['drop']} others as its shots")
    write_whole(folder / "drop_helpers.py", _DROP_HELPERS)
    values = {**_parquet({"validation": str(file)}), "num_fewshot": SHOTS["drop"], **_tasks()["drop"]}
    _write(folder, "drop", {"task": f"{PREFIX}drop", **values}, _DROP_RESULTS)


def _humaneval(data: Path, folder: Path) -> None:
    file = data / "test.parquet"
    _read(file, ("task_id", "prompt", "entry_point", "test"))
    write_humaneval(folder, _parquet({"test": str(file)}))


def write_humaneval(folder: Path, where: dict[str, Any]) -> str:
    """HumanEval as a task that only generates: `sandbox` judges the programs, not lm-eval."""
    _write(folder, "humaneval", {"task": f"{PREFIX}humaneval", **where, **_tasks()["humaneval"]})
    return f"{PREFIX}humaneval"


@cache
def _tasks() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((files("ziggurat") / "evaluation" / "local_tasks.yaml").read_text(encoding="utf-8"))


def _parquet(places: dict[str, str]) -> dict[str, Any]:
    return {"dataset_path": "parquet", "dataset_kwargs": {"data_files": places}}


def _read(file: Path, columns: tuple[str, ...]) -> Any:
    if not file.is_file():
        raise DataError(f"--data: {missing_path(file)}")
    table = read_table(str(file))
    for column in columns:
        require_column(table, column, "--data", str(file))
    return table


def _check_rows(file: Path, values: Any, column: str, expected: str, right: Callable[[list[Any]], bool]) -> None:
    """Raises DataError for wrong cells: lm-eval would take a text for a list of letters, and ignore a fifth choice."""
    for row, value in enumerate(values, start=1):
        if not isinstance(value, list) or not right(value):
            raise DataError(f"--data: row {row} of {file} needs {expected} in column '{column}', it has {value!r:.80}")


def _where(table: Any, column: str, value: str) -> Any:
    return table.select([index for index, cell in enumerate(table[column]) if cell == value])


def _write_part(folder: Path, task: str, part: str, splits: dict[str, Any], **more: Any) -> None:
    """Write a part of a task, with `more` fields, and its rows."""
    name = f"{task}_{part}"
    places = {split: str(folder / f"{name}.{split}.parquet") for split in splits}
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in splits.items():
        with told_of_storage(places[split]):
            table.to_parquet(places[split])
    _write(folder, name, {"task": PREFIX + name, **_parquet(places), **more, **_tasks()[task]})


def _write_group(folder: Path, task: str, parts: list[str], **aggregate: Any) -> None:
    names = [f"{PREFIX}{task}_{part}" for part in parts]
    aggregates = [{**aggregate, "weight_by_size": True}]
    _write(folder, task, {"group": PREFIX + task, "task": names, "aggregate_metric_list": aggregates})


def _write(folder: Path, name: str, values: dict[str, Any], tail: str = "") -> None:
    write_whole(folder / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + tail)
