"""Adapters of an instruct task scored by lm-eval's tasks: real runs, real scores, nothing trained or scored twice."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tables import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from ziggurat.compare.evaluated import FILE
from ziggurat.compare.fill import fill, report
from ziggurat.compare.table import Table, make_table
from ziggurat.compare.worker import take
from ziggurat.errors import DataError, RecipeError
from ziggurat.evaluation.lm import evaluate
from ziggurat.training.answers.load import load_adapter_model

METHODS = {
    "as it is": {"method.name": "none"},
    "LoRA": {"method.name": "lora", "method.r": 2, "method.target_modules": ["q_proj"]},
}


def made(model: Path, out: Path, evaluation: dict[str, Any], **more: Any) -> Table:
    rows = [{"instruction": "what is the sum", "input": "", "output": word} for word in ("one", "two", "0", "1") * 2]
    train = {"max_steps": 2, "batch": 4, "lr": 0.1, "evaluate": "never", "evaluate_before": False, "save": "never"}
    alpaca = {
        "data.train": str(write_jsonl(out.with_suffix(".jsonl"), rows)),
        "data.validation_rows": 2,
        "evaluate": evaluation,
    }
    values = {
        "set": {"model": str(model), "train": train},
        "methods": METHODS,
        "tasks": {"alpaca": alpaca},
        "seeds": [1, 2],
        "published": "llama2-alpaca",
        **more,
    }
    return make_table(values, "instruct", out)


def test_every_task_is_a_column_and_the_base_model_a_row(llama: Path, data: Path, tmp_path: Path) -> None:
    whole = {"tasks": ["mmlu", "humaneval"], "data": str(data), "limit": 2, "run_generated_code": True}
    table = made(llama, tmp_path / "out", whole, seeds=[2])
    assert table.metrics == {"mmlu": "acc", "humaneval": "pass@1"} and not table.notes
    filled = fill(table)
    assert (filled.taken, filled.failed, len(filled.summary.lines)) == (2, [], 2)
    cells = filled.summary.cells
    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(llama)), AutoTokenizer.from_pretrained(str(llama))
    alone = evaluate(model, tokenizer, ["mmlu"], data=data, limit=2)[0]
    assert cells["as it is", "mmlu"].scores == {2: alone.scores["acc"]}
    assert set(cells["LoRA", "humaneval"].scores) == {2} and ("LoRA", "average") in cells

    text = (tmp_path / "out" / "table.md").read_text()
    assert "| method | parameters | mmlu (acc) | humaneval (pass@1) | average |" in text
    assert f"| as it is | 0 | {alone.scores['acc']:.2f} |" in text
    assert "| *published: no fine-tuning* | *-* | *45.96* | *12.2* |" in text and "*published: LoRA*" in text
    assert "Trained on alpaca, scored by lm-eval on mmlu, humaneval (the first 2 questions" in text
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert {(row["method"], row["task"]) for row in rows} >= {("as it is", "mmlu"), ("LoRA", "humaneval")}

    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    base = next(line for line in lines if line["method"] == "as it is")
    assert base["recipe"].keys() == {"method.name", "model", "dtype"} and base["versions"]["lm_eval"]
    assert base["evaluated"]["mmlu"] == {"scores": alone.scores, "per_cent": ["acc"], "rows": 4, "shots": 5}
    trained = [line for line in lines if line["method"] == "LoRA"]
    assert all(line["metric"] == "perplexity" and line["score"] > 1 for line in trained)

    # Another task is scored on the same adapter; what has a score keeps it.
    folder = Path(table.runs[-1].recipe.folder)
    kept = json.loads((folder / FILE).read_text())
    kept["mmlu"]["scores"]["acc"] = 12.5
    (folder / FILE).write_text(json.dumps(kept))
    run_json = (folder / "run.json").stat().st_mtime_ns
    more = made(llama, tmp_path / "out", {"tasks": ["mmlu", "drop"], "data": str(data), "limit": 2}, seeds=[2])
    info = take(more.runs[-1].recipe, more.runs[-1].evaluation)
    assert (folder / "run.json").stat().st_mtime_ns == run_json
    assert info["evaluated"]["mmlu"]["scores"]["acc"] == 12.5 and info["evaluated"]["drop"]["rows"] == 2
    # What the base model scored stands for every seed.
    both = report(made(llama, tmp_path / "out", whole, seeds=[1, 2])).summary
    assert set(both.cells["as it is", "mmlu"].scores) == {1, 2} and set(both.cells["LoRA", "mmlu"].scores) == {2}
    assert f"| as it is | 0 | {alone.scores['acc']:.2f} |" in (tmp_path / "out" / "table.md").read_text()


def test_what_is_missing_is_said_before_anything_runs(llama: Path, tmp_path: Path) -> None:
    table = made(llama, tmp_path / "out", {"tasks": ["mmlu", "drop"], "data": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match="does not exist"):
        fill(table)
    assert not (tmp_path / "out" / "runs").exists() and report(table).summary.lines == []


def test_the_key_follows_what_is_scored(llama: Path, tmp_path: Path) -> None:
    def keys(evaluation: dict[str, Any], **more: Any) -> list[str]:
        return [run.key for run in made(llama, tmp_path / "out", evaluation, **more).runs]

    first = keys({"tasks": ["mmlu"]})
    assert len(set(first)) == 3 and keys({"tasks": {"mmlu": "acc"}, "batch": 2}) == first
    assert not set(first) & set(keys({"tasks": ["mmlu"], "limit": 3}))
    # The base model's row doesn't depend on how the others are trained.
    slower = made(llama, tmp_path / "out", {"tasks": ["mmlu"]}, methods={**METHODS, "again": METHODS["LoRA"]})
    assert {run.key for run in slower.runs} == set(first)
    train = {"model": str(llama), "train.epochs": 7}
    assert set(keys({"tasks": ["mmlu"]}, set=train)) & set(first) == {first[0]}
    folders = {Path(run.recipe.folder).name for run in made(llama, tmp_path / "out", {"tasks": ["drop"]}).runs}
    assert folders == {Path(run.recipe.folder).name for run in slower.runs if run.method != "again"}


def test_a_recipes_own_data_and_names_used_twice(tmp_path: Path) -> None:
    tasks = {
        "alpaca": {"evaluate": {"tasks": {"mmlu": None, "hellaswag": "acc_norm"}}},
        "other": {"data.train": "mine.json", "evaluate": {"tasks": ["mmlu"], "limit": 5}},
    }
    values = {"recipe": "llama2-alpaca", "methods": METHODS, "tasks": tasks, "seeds": [1]}
    table = make_table(values, "mine", tmp_path)
    assert table.metrics == {"alpaca mmlu": "acc", "hellaswag": "acc_norm", "other mmlu": "acc"}
    by = {run.task: run.recipe for run in table.runs if run.method == "LoRA"}
    assert by["alpaca"].data.train == "yahma/alpaca-cleaned" and by["alpaca"].data.loss == "all"
    # What is learned of a text is the recipe's to say, whatever the data.
    assert by["other"].data.train == "mine.json" and by["other"].task == "instruct" and by["other"].data.loss == "all"
    values = {**values, "methods": {"LoRA": METHODS["LoRA"]}, "tasks": ["rte"]}
    assert make_table(values, "mine", tmp_path).runs[0].recipe.data.loss == "answer"  # which nothing reads there


def test_mistakes_of_an_evaluation_come_at_once(tmp_path: Path) -> None:
    evaluation = {"tasks": ["humaneval", "hellaswag"], "limit": 0, "data": 3, "shots": 5}
    tasks: dict[str, Any] = {
        "alpaca": {"data.train": "a.json", "evaluate": evaluation},
        "plain": {"data.train": "a.json", "evaluate": ["mmlu"]},
        "mmlu": None,
    }
    methods = {**METHODS, "wrong": {"method.name": "none", "method.r": 3}}
    with pytest.raises(RecipeError) as error:
        make_table({"set": {"model": "x"}, "methods": methods, "tasks": tasks, "seeds": [1]}, "mine", tmp_path)
    raised = str(error.value)
    parts = [
        "alpaca: evaluate: shots: unknown",
        "run_generated_code: true",
        "say which of its metrics",
        "limit: must be greater than 0",
    ]
    parts += [
        "[folder of local parquet]",
        "plain: evaluate: a mapping with tasks",
        "by evaluate: {tasks: [mmlu]}",
    ]
    parts += ["wrong: method.name: none is the base model as it is"]
    for part in parts:
        assert part in raised
    assert f"has {len(parts)} problems" in raised


def test_only_language_models_are_scored_and_only_they_need_no_training(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {"rte": {"evaluate": {"tasks": ["mmlu"]}, "data.train": "glue/rte"}, "cola": None}
    with pytest.raises(RecipeError) as error:
        make_table({"set": {"model": "x"}, "methods": METHODS, "tasks": tasks, "seeds": [1]}, "mine", tmp_path)
    raised = str(error.value)
    assert "LoRA on rte: " in raised and "as it is on cola: method.name: none has no trained head" in raised
    tasks["rte"]["task"] = "classification"
    with pytest.raises(RecipeError, match="evaluate: is for task: instruct"):
        make_table({"set": {"model": "x"}, "methods": METHODS, "tasks": tasks, "seeds": [1]}, "mine", tmp_path)


def test_retention_is_the_perplexity_of_plain_text_with_the_adapter_and_without(llama: Path, tmp_path: Path) -> None:
    """Against a loop over the whole text, which is shorter than a block; lm-eval isn't asked."""
    text = tmp_path / "plain.txt"
    text.write_text("0 1 A B what is the sum " * 5, encoding="utf-8")
    table = made(llama, tmp_path / "out", {"retention": str(text)}, seeds=[2], published=None)
    assert table.metrics == {"retention": "perplexity"}
    filled = fill(table)
    assert not filled.failed
    cells, before = filled.summary.cells, filled.summary.second
    tokenizer = AutoTokenizer.from_pretrained(str(llama))
    ids = tokenizer(text.read_text(encoding="utf-8").strip(), add_special_tokens=False, return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(str(llama)).eval()
    trained = load_adapter_model(table.runs[-1].recipe.folder).model
    with torch.no_grad():
        plain, adapted = (float(model(input_ids=ids, labels=ids).loss.exp()) for model in (base, trained))
    assert cells["as it is", "retention"].scores[2] == pytest.approx(plain, rel=1e-5)
    assert cells["LoRA", "retention"].scores[2] == pytest.approx(adapted, rel=1e-5)
    assert before["LoRA", "retention"].scores[2] == pytest.approx(plain, rel=1e-5)
    assert abs(adapted - plain) > 1e-3
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| method | parameters | retention (perplexity / before) |" in page
    assert f"| {adapted:.2f} / {plain:.2f} |" in page
    assert "retention is the perplexity of the text plain.txt / without the adapter" in page

    # Another text is scored on the adapter that is there.
    run_json = (Path(table.runs[-1].recipe.folder) / "run.json").stat().st_mtime_ns
    text.write_text("B A 1 0 " * 5, encoding="utf-8")
    again = made(llama, tmp_path / "out", {"retention": str(text)}, seeds=[2], published=None)
    assert again.runs[-1].key != table.runs[-1].key
    info = take(again.runs[-1].recipe, again.runs[-1].evaluation)
    assert info["evaluated"]["retention"]["scores"]["perplexity"] != cells["LoRA", "retention"].scores[2]
    assert (Path(table.runs[-1].recipe.folder) / "run.json").stat().st_mtime_ns == run_json


@pytest.mark.parametrize(
    ("content", "message"), [(None, "can't be read as text"), (b"\xff\xfe", "can't be read"), (b" \n", "is empty")]
)
def test_a_text_that_is_none_is_refused_before_anything_runs(
    content: bytes | None, message: str, llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "plain.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(DataError, match=message):
        fill(made(llama, tmp_path / "out", {"retention": str(text)}, published=None))
