"""`ziggurat eval ADAPTER --data FILE`: a labelled file of one's own, by the task of the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from training_tables import reviews, tiny_recipe, write_csv, write_jsonl

from commands import main
from ziggurat.training.answers.predict import predict
from ziggurat.training.loop.run import train


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    data = write_csv(folder / "a.csv", reviews(48))
    return train(tiny_recipe(tiny_bert, data, folder / "out", train__epochs=10)).folder


def scored(adapter: Path, file: Path, *words: str) -> dict[str, Any]:
    out = file.with_suffix(".scores.json")
    assert main("eval", str(adapter), "--data", str(file), "--out", str(out), *words) == 0
    scores = json.loads(out.read_text())
    # A score of 100 or 0 is the same in all draws of rows.
    assert {name for name, value in scores["scores"].items() if value not in (0, 100)} <= scores["intervals"].keys()
    assert all(low < high for low, high in scores["intervals"].values())
    return scores


def test_classes_with_interval_matrix_and_mistakes(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = reviews(20)
    answers = [scores.answer for scores in predict(classifier, [row["text"] for row in rows])]
    other = {"pos": "neg", "neg": "pos"}
    # Three labels are turned round, so that at least one class has mistakes.
    for row, answer in zip(rows, answers, strict=True):
        row["label"] = str(answer)
    for row in rows[:3]:
        row["label"] = other[row["label"]]
    scores = scored(classifier, write_csv(tmp_path / "test.csv", rows))
    assert scores["rows"] == 20 and scores["scores"]["accuracy"] == pytest.approx(85.0)
    wilson = binomtest(17, 20).proportion_ci(0.95, "wilson")
    assert scores["intervals"]["accuracy"] == pytest.approx([100 * wilson.low, 100 * wilson.high])
    classes = scores["by_class"]
    assert sum(map(sum, classes["confusion"])) == 20 and len(classes["mistakes"]) == 3
    for place, row in enumerate(classes["classes"]):
        hits, counts = classes["confusion"][place][place], classes["confusion"][place]
        assert row["rows"] == sum(counts) and row["recall"] == pytest.approx(100 * hits / sum(counts))
        answered = sum(line[place] for line in classes["confusion"])
        assert row["precision"] == pytest.approx(100 * hits / answered)
    sure = [wrong["probability"] for wrong in classes["mistakes"]]
    assert sure == sorted(sure, reverse=True) and {w["text"] for w in classes["mistakes"]} == {
        row["text"] for row in rows[:3]
    }
    printed = capsys.readouterr().out
    for name in ("f1", "matthews"):
        low, high = scores["intervals"][name]
        assert low < scores["scores"][name] < high
    assert "accuracy 85.00%  (95% interval 63.96 to 94.76)" in printed and "most confident mistakes:" in printed


def test_what_a_file_lacks_is_said_before_a_model_is_loaded(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ziggurat.training.answers.load.load_adapter_model", loads)
    unknown = write_csv(tmp_path / "unknown.csv", [{"text": "a film", "label": "fair"}])
    gap = write_csv(tmp_path / "gap.csv", [{"text": "", "label": "pos"}, {"text": "a film", "label": "pos"}])
    columns = write_csv(tmp_path / "columns.csv", [{"sentence": "a film", "label": "pos"}])
    for words, message in (
        (
            ["--data", str(unknown)],
            "has 'fair' in column 'label', which the model does not know",
        ),
        (
            ["--data", str(gap)],
            "1 of 2 rows cannot be used; mend them, or take them out row 1: no text",
        ),
        (["--data", str(columns)], "has no column 'text'"),
        (["--data", str(tmp_path / "none.csv")], "none.csv' does not exist"),
        ([], "nothing to score on"),
        (["--data", str(unknown), "--keep-tasks", "x"], "--keep-tasks: for --tasks only"),
        (["--tasks", "glue/sst2", "--keep-tasks", "x"], "--keep-tasks: GLUE's tasks have no task files"),
        (["--data", str(unknown), "--out", str(unknown)], "exists and holds no scores of this command"),
    ):
        assert main("eval", str(classifier), *words) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_scores_of_a_rare_class_that_is_always_right_have_no_interval(classifier: Path, tmp_path: Path) -> None:
    rows = reviews(60)
    for row, answer in zip(rows, predict(classifier, [row["text"] for row in rows]), strict=True):
        row["label"] = str(answer.answer)
    rare = [row for row in rows if row["label"] == "pos"][:2]
    table = rare + [row for row in rows if row["label"] == "neg"]
    assert len(rare) == 2 and len(table) > 12
    scores = scored(classifier, write_csv(tmp_path / "rare.csv", table))
    assert scores["scores"]["f1"] == scores["scores"]["matthews"] == 100
    assert scores["intervals"].keys() == {"accuracy"}
    # The same command may write over its own scores.
    assert scored(classifier, tmp_path / "rare.csv") == scores


def test_numbers(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": float(index % 5)} for index, row in enumerate(reviews(24))]
    file = write_csv(tmp_path / "numbers.csv", rows)
    run = train(tiny_recipe(tiny_bert, file, tmp_path / "out", task="regression", train__max_steps=2))
    scores = scored(run.folder, file)
    low, high = scores["intervals"]["pearson"]
    assert low <= scores["scores"]["pearson"] <= high and scores["by_class"] == {}
    low, high = scores["intervals"]["rmse"]
    assert low < scores["scores"]["rmse"] < high
    answers = [float(each.answer) for each in predict(run.folder, [row["text"] for row in rows])]
    gaps = [(a - row["label"]) ** 2 for a, row in zip(answers, rows, strict=True)]
    assert scores["scores"]["rmse"] == pytest.approx(math.sqrt(sum(gaps) / len(gaps)), rel=1e-5)


def test_answers_by_loss_and_word_for_word(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what colour is the {what} ", "completion": message}
        for what, message in (("sky", "blue"), ("grass", "green"))
    ]
    file = write_jsonl(tmp_path / "questions.jsonl", rows * 12)
    options: dict[str, Any] = {"task": "instruct", "data__validation": str(file), "train__epochs": 8}
    run = train(tiny_recipe(tiny_llama, file, tmp_path / "out", data__validation_rows=None, **options))
    scores = scored(run.folder, file)
    # The run scored the very same rows, by TRL's loss.
    assert scores["scores"]["perplexity"] == pytest.approx(run.after["perplexity"], rel=1e-4)
    asked = predict(run.folder, [row["prompt"] for row in rows])
    hits = sum(each.answer == row["completion"] for each, row in zip(asked, rows, strict=True))
    assert scores["scores"]["exact_match"] == 50.0 * hits


def test_preferences_by_the_rewards_of_training(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word} ", "chosen": "yes", "rejected": "no"} for word in ("one", "two", "three")]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows * 8)
    options: dict[str, Any] = {"task": "dpo", "data__validation": str(file), "train__max_steps": 6}
    run = train(tiny_recipe(tiny_llama, file, tmp_path / "out", data__validation_rows=None, **options))
    scores = scored(run.folder, file)
    assert scores["scores"]["accuracy"] == pytest.approx(100 * run.after["rewards/accuracies"])
    assert scores["scores"]["margin"] == pytest.approx(run.after["rewards/margins"], rel=1e-3, abs=1e-4)


def test_verdicts_by_the_distance_of_their_rewards(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say {word} ", "completion": completion, "label": completion == "yes"}
        for word in ("one", "two", "three")
        for completion in ("yes", "no")
    ]
    file = write_jsonl(tmp_path / "verdicts.jsonl", rows * 8)
    options: dict[str, Any] = {"task": "kto", "data__validation": str(file), "train__max_steps": 4}
    run = train(tiny_recipe(tiny_llama, file, tmp_path / "out", data__validation_rows=None, **options))
    scores = scored(run.folder, file)
    low, high = scores["intervals"]["margin"]
    assert low < scores["scores"]["margin"] < high


def test_an_adapter_of_another_program_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    from plain_models import NoStack

    torch.manual_seed(0)
    get_peft_model(NoStack(), LoraConfig(target_modules=["lin0"])).save_pretrained(str(tmp_path / "lora"))  # type: ignore[arg-type]
    assert main("eval", str(tmp_path / "lora"), "--data", str(tmp_path / "a.csv")) == 2
    assert "--tasks scores other adapters" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main("eval", "lorra", "--data", "a.csv") == 2
    assert "'lorra' does not exist; nearest in this folder: lora" in capsys.readouterr().err
