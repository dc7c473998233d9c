"""MMLU, BBH, DROP and HumanEval from local parquet files, as task files for stock lm-eval too.

The data lie in `<data>/<task>/`, in these columns:

    mmlu       test, dev         subject, question, choices, answer
    bbh        test              task, input, target;  cot_prompts: task, prompt
    drop       validation        passage, question, answers
    humaneval  test              task_id, prompt, entry_point, test

`write_tasks` writes YAML files (and splits MMLU and BBH into their parts), so that `lm_eval --include_path FOLDER
--tasks ziggurat_mmlu` runs exactly what `ziggurat eval` runs. Prompts, ends and lengths of answers, and their
extraction, are those of lm-eval's own tasks of these names (BBH: `bbh_cot_fewshot`); docs/evaluation.md lists the
exceptions.
"""

from collections import Counter
from collections.abc import Callable
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
_BYPASS = [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]
#: DROP's own em and F1 are lm-eval's; the file gives stock lm-eval a way to them.
_DROP_HELPERS = "from lm_eval.tasks.drop.utils import process_results\n\n__all__ = ['process_results']\n"


def write_tasks(names: list[str], data: Path, folder: Path) -> dict[str, str]:
    """Write the task files of `names` into `folder`; name -> the name of its task or group for lm-eval.

    Raises DataError for missing files or columns, StorageError if the task files can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"mmlu": _mmlu, "bbh": _bbh, "drop": _drop, "humaneval": _humaneval}
    for name in names:
        makers[name](data.expanduser().resolve() / name, folder.resolve())
    return {name: PREFIX + name for name in names}


def _mmlu(data: Path, folder: Path) -> None:
    columns = ("subject", "question", "choices", "answer")
    test, dev = _read(data / "test.parquet", columns), _read(data / "dev.parquet", columns)
    subjects = sorted(set(test["subject"]))
    shots = Counter(dev["subject"])
    few = [subject for subject in subjects if shots[subject] < SHOTS["mmlu"]]
    if few:
        raise DataError(f"{data / 'dev.parquet'} has fewer than the {SHOTS['mmlu']} shots of {', '.join(few)}")
    for table, file in ((test, "test.parquet"), (dev, "dev.parquet")):
        _check_rows(data / file, table["choices"], "choices", "four choices", lambda choices: len(choices) == 4)
    for subject in subjects:
        about = subject.replace("_", " ")
        _write_part(
            folder,
            f"mmlu_{subject}",
            {split: _where(table, "subject", subject) for split, table in (("test", test), ("dev", dev))},
            {
                "test_split": "test",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "num_fewshot": SHOTS["mmlu"],
                "output_type": "multiple_choice",
                "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
                "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
                "D. {{choices[3]}}\nAnswer:",
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
        )
    _write_group(folder, "mmlu", [f"mmlu_{subject}" for subject in subjects], "acc", None)


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
        _write_part(
            folder,
            f"bbh_{task}",
            {"test": _where(test, "task", task)},
            {
                "test_split": "test",
                "num_fewshot": 0,
                "output_type": "generate_until",
                "description": "{% raw %}" + prompt.strip() + "{% endraw %}\n\n",
                "doc_to_text": "Q: {{input}}\nA: Let's think step by step.\n",
                "doc_to_target": "{{target}}",
                "generation_kwargs": {"until": ["</s>", "Q", "\n\n"], "max_gen_toks": 1024, "do_sample": False},
                "filter_list": [
                    {
                        "name": "get-answer",
                        "filter": [
                            {"function": "regex", "regex_pattern": "(?<=the answer is )(.*)(?=.)"},
                            {"function": "take_first"},
                        ],
                    }
                ],
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            },
        )
    _write_group(folder, "bbh", [f"bbh_{task}" for task in tasks], "exact_match", "get-answer")


def _drop(data: Path, folder: Path) -> None:
    file = data / "validation.parquet"
    table = _read(file, ("passage", "question", "answers"))
    _check_rows(file, table["answers"], "answers", "a list of answers", lambda answers: bool(answers) and all(answers))
    if len(table) <= SHOTS["drop"]:
        raise DataError(f"{file} has {len(table)} rows; a question needs {SHOTS['drop']} others as its shots")
    write_whole(folder / "drop_helpers.py", _DROP_HELPERS)
    values = {
        "task": f"{PREFIX}drop",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
        # The shots come from the same split, never the question itself: there is no file of the training split.
        "fewshot_split": "validation",
        "num_fewshot": SHOTS["drop"],
        "output_type": "generate_until",
        "doc_to_text": "{{passage}} {{question}}",
        "doc_to_target": "{{answers[0]}}",
        "target_delimiter": "",
        # lm-eval's own task stops at ".", in the middle of a number; every seventh question has only answers with a
        # point.
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("em", "f1")],
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # A tag of lm-eval, which YAML dumpers don't write.
    write_whole(folder / "drop.yaml", f"{text}process_results: !function drop_helpers.process_results\n")


def _humaneval(data: Path, folder: Path) -> None:
    file = data / "test.parquet"
    _read(file, ("task_id", "prompt", "entry_point", "test"))
    write_humaneval(folder, {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(file)}}})


def write_humaneval(folder: Path, where: dict[str, Any]) -> str:
    """HumanEval as a task that only generates: `sandbox` judges the programs, not lm-eval."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "task": f"{PREFIX}humaneval",
        **where,
        "test_split": "test",
        "num_fewshot": SHOTS["humaneval"],
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "metric_list": _BYPASS,
    }
    write_whole(folder / "humaneval.yaml", yaml.safe_dump(values, sort_keys=False))
    return str(values["task"])


def _read(file: Path, columns: tuple[str, ...]) -> Any:
    if not file.is_file():
        raise DataError(f"--data: {missing_path(file)}")
    table = read_table(str(file))
    for column in columns:
        require_column(table, column, "--data", str(file))
    return table


def _check_rows(file: Path, values: Any, column: str, wanted: str, right: Callable[[list[Any]], bool]) -> None:
    """Raises DataError for wrong cells: lm-eval would take a text for a list of letters, and ignore a fifth choice."""
    for row, value in enumerate(values, start=1):
        if not isinstance(value, list) or not right(value):
            raise DataError(f"--data: row {row} of {file} needs {wanted} in column '{column}', it has {value!r:.80}")


def _where(table: Any, column: str, value: str) -> Any:
    return table.select([index for index, one in enumerate(table[column]) if one == value])


def _write_part(folder: Path, name: str, splits: dict[str, Any], values: dict[str, Any]) -> None:
    files = {}
    for split, table in splits.items():
        files[split] = str(folder / f"{name}.{split}.parquet")
        with told_of_storage(files[split]):
            table.to_parquet(files[split])
    whole = {"task": PREFIX + name, "dataset_path": "parquet", "dataset_kwargs": {"data_files": files}, **values}
    write_whole(folder / f"{name}.yaml", yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))


def _write_group(folder: Path, name: str, parts: list[str], metric: str, chosen: str | None) -> None:
    aggregate: dict[str, Any] = {"metric": metric, "weight_by_size": True}
    if chosen is not None:
        aggregate["filter_list"] = [chosen]
    whole = {"group": PREFIX + name, "task": [PREFIX + part for part in parts], "aggregate_metric_list": [aggregate]}
    write_whole(folder / f"{name}.yaml", yaml.safe_dump(whole, sort_keys=False))
