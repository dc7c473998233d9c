"""`ziggurat init`: a recipe from a file's columns and rows; and `recipes --keys`."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from commands import main
from ziggurat.recipe.recipe import load_recipe
from ziggurat.recipe.schema import Recipe, keys

FORMS = Path(__file__).parent / "forms"


def made(file: Path, out: Path, *words: str) -> Recipe:
    assert main("init", str(file), "--out", str(out), *words) == 0
    return load_recipe(out)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_ticket_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"{n};a text about case {n}, at some length;{('account', 'billing', 'ACCOUNT ')[n % 3]}" for n in range(30)
    ]
    file = tmp_path / "tickets.csv"
    file.write_text("id;message;topic\n" + "\n".join(lines) + "\n31;;billing\n", encoding="utf-8")
    assert main("train", str(file)) == 2
    assert f"`ziggurat init {file}` writes one" in capsys.readouterr().err
    recipe = made(file, tmp_path / "tickets.yaml")
    assert recipe.task == "classification" and recipe.data.text == "message" and recipe.data.label == "topic"
    assert recipe.data.similar_labels == "merge" and recipe.data.drop_missing and recipe.data.max_length == 32
    text = (tmp_path / "tickets.yaml").read_text()
    assert "1 of 31 rows lack a text or a label" in text and "parameters;" in text and "# model: answerdotai/" in text
    assert all("#" in line for line in text.splitlines())
    capsys.readouterr()
    assert main("init", str(file), "--out", str(tmp_path / "tickets.yaml")) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "task", "shape"),
    [
        ("alpaca.json", "instruct", "alpaca"),
        ("chat.jsonl", "instruct", "messages"),
        ("sharegpt.jsonl", "instruct", "messages"),
        ("texts.txt", "instruct", "text"),
        ("pairs.jsonl", "dpo", "auto"),
        ("chat_pairs.jsonl", "dpo", "auto"),
        ("kto.jsonl", "kto", "auto"),
    ],
)
def test_the_forms_that_are_known_by_their_columns(name: str, task: str, shape: str, tmp_path: Path) -> None:
    recipe = made(FORMS / name, tmp_path / "made.yaml", "--model", str(tmp_path / "model"))
    assert (recipe.task, recipe.data.format) == (task, shape)
    assert recipe.method["target_modules"] == "all-linear" and recipe.model == str(tmp_path / "model")


def test_words_with_tags_and_lists_of_labels(tmp_path: Path) -> None:
    tagged = made(FORMS / "tagged.jsonl", tmp_path / "tagged.yaml")
    assert tagged.task == "tokens" and tagged.data.columns.tokens is None
    rows = [{"tokens": ["a", "b"], "ner_tags": ["O", "B-x"]} for _ in range(9)]
    other = made(write(tmp_path / "other.jsonl", rows), tmp_path / "other.yaml")
    assert (other.task, other.data.columns.tokens, other.data.columns.tags) == ("tokens", None, "ner_tags")
    several = made(FORMS / "labels.jsonl", tmp_path / "several.yaml")
    assert (several.task, several.data.text, several.data.label) == ("multilabel", "text", "label")


def test_a_table_of_another_encoding_and_chats_about_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"où est le colis {n};{'lost' if n % 2 else 'late'}\n" for n in range(20))
    (tmp_path / "a.csv").write_bytes(f"text;label\n{rows}".encode("cp1252"))
    recipe = made(tmp_path / "a.csv", tmp_path / "a.yaml", "--model", str(tmp_path / "model"))
    assert recipe.data.encoding == "cp1252"
    assert "it is not UTF-8; check whether this is right: où est le colis 0" in capsys.readouterr().out
    seen = made(FORMS / "images.jsonl", tmp_path / "b.yaml")
    assert (seen.task, seen.tower, seen.model) == ("instruct", "language", "HuggingFaceTB/SmolVLM-256M-Instruct")


def test_a_name_that_the_terminal_cannot_show_is_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, or a pipe on Windows, without Chinese signs."""
    screen = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.chdir(tmp_path)
    write(Path("\u6570.jsonl"), [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(20)])
    assert main("init", "\u6570.jsonl") == 0 and Path("\u6570.yaml").is_file()
    screen.flush()
    assert rb"written: \u6570.yaml" in screen.buffer.getvalue()  # type: ignore[attr-defined]


def test_questions_and_answers(tmp_path: Path) -> None:
    rows = [{"question": f"what is {n} and one", "answer": f"that is {n + 1}"} for n in range(20)]
    recipe = made(write(tmp_path / "a.jsonl", rows), tmp_path / "made.yaml", "--model", str(tmp_path / "model"))
    assert (recipe.task, recipe.data.format, recipe.data.as_chat) == ("instruct", "prompt", True)


def test_two_texts_and_a_number_and_what_fits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "score": n / 2} for n in range(20)]
    file = write(tmp_path / "pairs.jsonl", rows)
    recipe = made(file, tmp_path / "made.yaml")
    assert recipe.task == "regression" and (recipe.data.text, recipe.data.text_pair) == ("sentence1", "sentence2")
    as_classes = made(file, tmp_path / "classes.yaml", "--task", "classification")
    assert as_classes.task == "classification" and as_classes.data.label == "score"
    # Lists of tags are passed over; a number that is missing is no class.
    tagged = [{"text": f"a text of {n}", "tags": ["a", "b"], "stars": n % 3 if n else float("nan")} for n in range(20)]
    assert made(write(tmp_path / "tagged.jsonl", tagged), tmp_path / "tagged.yaml").data.label == "stars"
    # What the recipe counts as missing is what training would refuse, in every column that it reads.
    rows[0]["sentence2"], rows[1]["sentence1"], rows[2]["score"] = None, " ", math.inf
    made(file := write(tmp_path / "gaps.jsonl", rows), tmp_path / "gaps.yaml")
    assert "2 of 20 rows lack a text or a label" in (tmp_path / "gaps.yaml").read_text()
    capsys.readouterr()
    # A task that the file is not fit for is refused, not replaced by another.
    texts = write(tmp_path / "texts.jsonl", [{"text": f"a text of {n}", "topic": "ab"[n % 2]} for n in range(9)])
    for words, message in ((("regression",), "text, topic, which fit regression"), (("kto",), "which fit kto")):
        assert main("init", str(texts), "--out", str(tmp_path / "none.yaml"), "--task", *words) == 2
        assert message in capsys.readouterr().err
    alone = write(tmp_path / "alone.jsonl", [{"text": f"a text of {n}"} for n in range(9)])
    assert main("init", str(alone), "--out", str(tmp_path / "none.yaml"), "--task", "classification") == 2
    capsys.readouterr()
    table = write(tmp_path / "numbers.jsonl", [{"a": n, "b": n} for n in range(9)])
    assert main("init", str(table), "--out", str(tmp_path / "none.yaml")) == 2
    assert (
        "has the columns a, b, which fit no task" in capsys.readouterr().err and not (tmp_path / "none.yaml").exists()
    )


def test_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("recipes", "--keys") == 0
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(keys()) <= set(printed)
    assert all(info.description in printed[key] for key, info in keys().items())
