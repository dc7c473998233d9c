"""The command: clean errors, exit codes, Ctrl-C and resume in a real process, predict, export, merge."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

# Fixtures and tables of the training tests serve here too.
from training_tables import reviews, save_tiny_bert, write_csv

from commands import main
from fresh import Fresh
from tolerance import assert_models_agree

COMMAND = [sys.executable, "-m", "ziggurat.cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a table, a recipe, and a finished run in `out`."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_bert(folder / "tiny-bert")
    write_csv(folder / "reviews.csv", reviews(48))
    recipe = {
        "model": str(folder / "tiny-bert"),
        "data.train": str(folder / "reviews.csv"),
        "data.validation_rows": 8,
        "method.name": "msplora",
        "method.r": 4,
        "train.lr": 3.0e-2,
        "train.max_steps": 20,
        "train.batch": 8,
        "train.evaluate": 10,
        "train.save": "never",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    code = main("train", str(folder / "tiny.yaml"), f"output={folder / 'out'}")
    assert code == 0
    return folder


def test_train_ends_with_the_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", str(place / "tiny.yaml"), f"output={tmp_path / 'a'}", "train.max_steps=2") == 0
    printed = capsys.readouterr().out
    assert "tiny: classification with msplora" in printed
    assert "note: no validation data named: 8 of 48 rows split off with seed 42" in printed
    for part in ("accuracy before (%)", "trainable parameters, MSPLoRA r 4", "LoRA r 4, same layers", "Next:"):
        assert part in printed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "roberta-mrcp"], 2, "did you mean roberta-mrpc?"),
        (["train", "default", "train.lr=fast", "method.rank=3"], 2, "default.yaml has 2 problems:"),
        (["train", "data.train=nothing.csv"], 2, "nothing.csv' does not exist"),
        (["train", "default", "roberta-mrpc"], 2, "one recipe at a time"),
        (["recipes", "defualt"], 2, "did you mean default?"),
        (["predict", "nowhere", "x"], 2, "adapter folder 'nowhere' does not exist"),
        (["predict", "nowhere"], 2, "give either a text or --file"),
        (["export", "nowhere", "out"], 2, "nowhere"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_mistakes_end_in_clean_lines(
    words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(*words) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err


def test_debug_lets_the_error_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a file nor a recipe"):
        main("train", "nope", "--debug")


def test_recipes_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("default ") and any(line.startswith("roberta-rte ") for line in lines)
    assert main("recipes", "roberta-rte") == 0
    assert yaml.safe_load(capsys.readouterr().out)["data.subset"] == "rte"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--version") == 0
    assert capsys.readouterr().out.startswith("ziggurat 0.")


def test_predict_a_text_and_a_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("predict", str(place / "out"), "the film is very good") == 0
    assert capsys.readouterr().out.split()[0] in ("pos", "neg")
    assert main("predict", str(place / "out"), "--file", str(place / "reviews.csv"), "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 48 and set(rows[0]) == {"text", "answer", "shares"}
    lines = tmp_path / "a.txt"
    lines.write_text("the film is very good\n\nthe plot is very bad\n")
    assert main("predict", str(place / "out"), "--file", str(lines)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_export_and_merge_give_the_same_scores(place: Path, tmp_path: Path, capsys) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from ziggurat.training.answers.load import load_adapter_model

    assert main("export", str(place / "out"), str(tmp_path / "lora")) == 0
    assert main("merge", str(place / "out"), str(tmp_path / "whole")) == 0
    capsys.readouterr()
    loaded = load_adapter_model(place / "out")
    inputs = loaded.tokenizer(["the film is very good", "the plot"], padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(str(place / "tiny-bert"))
    plain = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    whole = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "whole")).eval()
    assert plain.peft_config["default"].peft_type.value == "LORA"
    assert whole.config.id2label == {0: "neg", 1: "pos"}
    with torch.no_grad():
        expected = loaded.model(**inputs).logits
        assert_models_agree(plain(**inputs).logits, expected)
        assert_models_agree(whole(**inputs).logits, expected)
    assert main("merge", str(place / "out"), str(tmp_path / "whole")) == 2
    assert "exists" in capsys.readouterr().err


def test_a_run_stopped_by_ctrl_c_resumes_to_the_very_same_adapter(
    place: Path, tmp_path: Path, fresh: Fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(place / "tiny.yaml"), f"output={out}", "train.max_steps=60", "train.evaluate=20"]
    # All three runs are processes of their own, as a user's are, with what other tests left in this one kept out.
    process = subprocess.Popen(
        [*COMMAND, "train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, env=fresh.env
    )
    assert process.stdout is not None
    seen = ""
    while "step 20 of 60" not in seen:
        line = process.stdout.readline()
        assert line, f"ended too early: {seen} {process.communicate()}"
        seen += line
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "stopped at step " in printed and not out.exists()
    command = shlex.split(printed.rpartition("Go on with: ")[2])
    assert command == ["ziggurat", "train", *words, "resume=true"]

    assert main("train", *words) == 2
    assert "Go on with resume=true" in capsys.readouterr().err
    assert main("train", *words, "train.lr=0.5", "resume=true") == 2
    assert "train.lr: 0.03 -> 0.5" in capsys.readouterr().err
    straight = tmp_path / "straight"
    for given in (command[1:], ["train", words[0], f"output={straight}", *words[2:]]):
        done = fresh.run("from ziggurat.cli import main; main()", *given)
        assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["steps"] == 60
    assert not out.with_name("out.unfinished").exists()

    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, straight)]
    assert weights[0] == weights[1]


def test_answers_as_files_from_stdin_and_a_system_prompt_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import csv
    import io

    import pyarrow.parquet as pq

    texts = ["the film is\nvery good", 'the "plot", bad', "=the & music"]
    file = tmp_path / "texts.json"
    file.write_text(json.dumps([{"text": text} for text in texts]))
    words = ["predict", str(place / "out"), "--file", str(file), "--batch", "2"]
    for name in ("a.csv", "a.json", "a.jsonl", "a.parquet"):
        assert main(*words, "--out", str(tmp_path / name)) == 0
    with (tmp_path / "a.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    # In a csv no text is a formula to a spreadsheet.
    assert [row["text"] for row in rows] == [*texts[:2], "'=the & music"]
    assert list(rows[0]) == ["text", "answer", "probability_neg", "probability_pos"]
    as_json = json.loads((tmp_path / "a.json").read_text())
    assert as_json == pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert as_json == [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert main(*words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3  # a line a row, whatever line breaks a text has
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\n\nthe plot\n"))
    assert main("predict", str(place / "out"), "-", "--json") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["the film", "the plot"]
    for more, message in (
        (["a text", "--system", "Be brief."], "not trained on conversations"),
        (["a text", "--out", str(tmp_path / "a.xlsx")], ".csv, .json, .jsonl, .parquet are written"),
        (["--file", str(file), "--out", str(file)], "is the file that is read, or lies in"),
        (
            ["a text", "--out", str(place / "out" / "adapter_config.json")],
            "lies in the adapter's folder; name another",
        ),
    ):
        assert main("predict", str(place / "out"), *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert json.loads(file.read_text()) == [{"text": text} for text in texts]
    assert main("chat", str(place / "out")) == 2
    assert "writes no texts: use `ziggurat predict`" in capsys.readouterr().err


def test_an_empty_recipe_name_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", "") == 2  # of a shell's variable that isn't set
    assert "'' is a folder without a recipe.yaml; name a recipe file" in " ".join(capsys.readouterr().err.split())
