"""What a run, or a command around it, says before something is lost: rows scored twice, settings without effect, files
of others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_tables import reviews, save_still_bert, tiny_recipe, write_csv, write_jsonl

from ziggurat.errors import DataError, RecipeError, StorageError
from ziggurat.plan.start import start
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.answers.write import check_place, write_answers
from ziggurat.training.data.examples import load_examples
from ziggurat.training.data.tables import texts_of
from ziggurat.training.loop.notes import _idle
from ziggurat.training.loop.run import train


def recipe(data: Path, **more: Any) -> Any:
    keys = {key.replace("__", "."): value for key, value in more.items()}
    return make_recipe({"model": "m", "data.train": str(data), "method.name": "lora", **keys})


def test_validation_rows_that_are_training_rows(tmp_path: Path) -> None:
    rows = reviews(24)
    learned = write_csv(tmp_path / "train.csv", rows)
    new = [{"text": f"{row['text']} {number}", "label": row["label"]} for number, row in enumerate(rows[:5])]
    told = " of 8 validation rows are training rows, too: their scores say nothing about rows that are new to the model"
    for scored, known in ((rows[:3] + new, 3), ([*new, *new[:3]], 0)):
        path = write_csv(tmp_path / "scored.csv", scored)
        notes = load_examples(recipe(learned, data__validation=str(path))).notes
        assert [note for note in notes if "validation rows are" in note] == ([f"{known}{told}"] if known else [])


def test_prompts_and_pairs_that_are_scored_and_learned(tmp_path: Path) -> None:
    pairs = [{"prompt": f"say {n}", "chosen": "one", "rejected": "two"} for n in range(8)]
    asked = [{"instruction": f"say {n}", "input": "", "output": f"{n}"} for n in range(8)]
    for task, rows, known in (("dpo", pairs, 4), ("instruct", asked, 4)):
        learned = write_jsonl(tmp_path / f"{task}.jsonl", rows[:6])
        scored = write_jsonl(tmp_path / f"{task}-scored.jsonl", rows[2:])
        notes = load_examples(recipe(learned, task=task, data__validation=str(scored))).notes
        assert any(note.startswith(f"{known} of 6 validation rows are training rows, too") for note in notes), notes


def test_a_file_without_a_head_line(tmp_path: Path) -> None:
    file = tmp_path / "bare.csv"
    file.write_text("".join(f"the film number {n} is fine,{'good' if n % 2 else 'bad'}\n" for n in range(40)))
    text, _ = start(str(file))
    assert "it is called as one of them: if the file has no head line, its first row is lost" in text
    notes = load_examples(recipe(file, data__text="the film number 0 is fine", data__label="bad")).notes
    assert any("column 'bad' is called as one of its labels; if the file has no head line" in note for note in notes)
    assert "head line" not in start(str(write_csv(tmp_path / "with.csv", reviews(40))))[0]
    named = [{"text": row["text"], "spam": "spam" if row["label"] == "pos" else "ham"} for row in reviews(40)]
    for file, told in ((write_jsonl(tmp_path / "n.jsonl", named), False), (write_csv(tmp_path / "n.csv", named), True)):
        notes = load_examples(recipe(file, data__label="spam")).notes
        assert any("head line" in note for note in notes) == told


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"data__weights": [3]}, ["data.weights has no effect with one training file"]),
        ({"data__delimiter": ";", "ending": ".jsonl"}, ["data.delimiter has no effect: a.jsonl has none to choose"]),
        ({"data__columns__prompt": "foo"}, ["data.columns has no effect with task: classification"]),
        ({"data__roles__user": ["x"]}, ["data.roles has no effect with task: classification"]),
        ({"data__delimiter": ";"}, []),
        ({"data__more": ["b.csv"], "data__weights": [1, 2]}, []),
        ({"task": "instruct", "data__columns__prompt": "question", "ending": ".jsonl"}, []),
    ],
)
def test_settings_without_effect(keys: dict[str, Any], told: list[str]) -> None:
    """Noted, not refused: runs of earlier versions have them in their recipes."""
    file = Path(f"a{keys.pop('ending', '.csv')}")
    notes = list(_idle(recipe(file, **keys)))
    assert len(notes) == len(told) and all(note.startswith(text) for note, text in zip(notes, told, strict=True))


def test_an_optimiser_by_its_usual_name() -> None:
    with pytest.raises(RecipeError, match=r"did you mean adamw_torch\?"):
        recipe(Path("a.csv"), train__optimizer="adam")


def test_a_warm_up_longer_than_the_run_and_a_module_that_is_not_there(tmp_path: Path) -> None:
    save_still_bert(tmp_path / "bert")
    data = write_csv(tmp_path / "reviews.csv", reviews(24))
    short = {"train__epochs": None, "train__max_steps": 3}
    result = train(tiny_recipe(tmp_path / "bert", data, tmp_path / "long", train__warmup=100, **short))
    told = "the warm-up (train.warmup) isn't over when the run ends, after step 3"
    assert [text for text in result.warnings if text.startswith(told)]
    result = train(tiny_recipe(tmp_path / "bert", data, tmp_path / "right", train__warmup=2, **short))
    assert not any("warm-up" in text for text in result.warnings)
    made = tiny_recipe(tmp_path / "bert", data, tmp_path / "none", method__modules_to_save=["nosuch"], **short)
    with pytest.raises(RecipeError, match=r"method\.modules_to_save: 'nosuch' matches no module"):
        train(made)


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_answers_replace_answers_alone(ending: str, tmp_path: Path) -> None:
    from ziggurat.training.answers.predict import Prediction

    out = tmp_path / f"answers{ending}"
    check_place(out)
    foreign = ["the notes of a year\n", "question,answer\nhow many,3\n", '{"question": "how many", "answer": "3"}\n']
    foreign += ['"the answer is 3"\n', '["the answer is 3"]\n', '[{"question": "how many", "answer": "3"}]\n']
    for content in foreign:
        out.write_text(content)
        with pytest.raises(StorageError, match="exists and holds no answers of this command"):
            check_place(out)
    if ending == ".json":
        out.write_text("[]\n")
        check_place(out)
    out.unlink()
    write_answers(out, [Prediction("a film", "pos", {"pos": 0.75, "neg": 0.25})], None)
    check_place(out)


def test_values_of_several_kinds_and_short_rows_name_their_rows(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a", "label": "0"}\n{"text": "b", "label": 1.5}\n{"text": "c", "label": null}\n')
    with pytest.raises(DataError, match="several kinds: a str in row 1, a float in row 2; write all alike"):
        load_examples(recipe(mixed))
    nested = write_jsonl(
        tmp_path / "nested.jsonl", [{"text": "a", "label": {"a": 1}}, {"text": "b", "label": {"a": "z"}}]
    )
    with pytest.raises(DataError, match=r"several kinds: .*z"):
        load_examples(recipe(nested))
    short = tmp_path / "short.csv"
    short.write_text("text,label\none,pos\nalone\n")
    with pytest.raises(DataError, match="a row needs as many cells as the head line"):
        load_examples(recipe(short))
    short.write_bytes("text,label\none,pos\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"looks like UTF-16 without its mark: set data\.encoding to utf-16-le"):
        load_examples(recipe(short))
    (tmp_path / "list.json").write_text('[["a"], {"text": "b"}]')
    with pytest.raises(DataError, match="entry 1 is a list"):
        load_examples(recipe(tmp_path / "list.json"))


def test_rows_without_a_text_are_not_answered() -> None:
    from datasets import Dataset

    with pytest.raises(DataError, match=r"2 of 3 rows of f\.csv have nothing in column 'text', the first is row 2"):
        texts_of(Dataset.from_dict({"text": ["a", " ", ""]}), "text", "f.csv")


def test_an_analysis_replaces_an_analysis_alone(tmp_path: Path) -> None:
    save_still_bert(tmp_path / "bert")
    data = write_csv(tmp_path / "reviews.csv", reviews(24))
    made = tiny_recipe(tmp_path / "bert", data, tmp_path / "run", train__epochs=None, train__max_steps=2)
    train(made)
    out = tmp_path / "analysis"
    out.mkdir()
    (out / "components.csv").write_text("mine")
    command = [sys.executable, "-m", "ziggurat", "analyze", str(tmp_path / "run"), "--out", str(out)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        refused.returncode == 2 and "holds a components.csv that no analysis wrote" in refused.stderr + refused.stdout
    )
    assert (out / "components.csv").read_text() == "mine" and len(list(out.iterdir())) == 1
    (out / "components.csv").unlink()
    (out / "notes.txt").write_text("mine")
    for _ in range(2):
        subprocess.run(command, capture_output=True, check=True)
    assert json.loads((out / "analysis.json").read_text()) and (out / "notes.txt").read_text() == "mine"
