"""Several training files: read each by itself, mixed by weight."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from training_tables import write_csv, write_jsonl

from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import make_recipe, resolved
from ziggurat.training.data.content import contents
from ziggurat.training.data.examples import Examples, load_examples

FORMS = Path(__file__).parents[1] / "forms"


def read(files: list[Path], **more: Any) -> Examples:
    values = {"model": "m", "data.train": [str(file) for file in files], "method.name": "lora"}
    return load_examples(make_recipe(values | {key.replace("__", "."): value for key, value in more.items()}))


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    first = [{"text": f"first {place}", "label": "ab"[place % 2], "id": place} for place in range(20)]
    second = [{"label": "bc"[place % 2], "text": f"second {place}"} for place in range(40)]
    return [write_csv(tmp_path / "a.csv", first), write_jsonl(tmp_path / "b.jsonl", second)]  # type: ignore[arg-type]


def test_weights_repeat_rows_and_draw_parts(two_files: list[Path]) -> None:
    examples = read(two_files, data__weights=[2.0, 0.25], data__validation_rows=12)
    assert examples.label_names == ["a", "b", "c"] and examples.train.column_names == ["text", "label"]
    scored = set(examples.validation["text"])
    assert len(scored) == 12 and not scored & set(examples.train["text"])
    counts = Counter(examples.train["text"])
    first = {text: count for text, count in counts.items() if text.startswith("first")}
    second = {text: count for text, count in counts.items() if text.startswith("second")}
    left = [sum(not text.startswith(word) for text in scored) for word in ("second", "first")]
    assert set(first.values()) == {2} and len(first) == 20 - left[0]
    assert set(second.values()) == {1} and len(second) == round(0.25 * (40 - left[1]))
    assert any(
        note.startswith(f"{two_files[1]}: {40 - left[1]} training rows, with weight 0.25") for note in examples.notes
    )
    assert len(read(two_files, data__validation_rows=12).train) == 48


def test_errors_name_the_row_of_its_own_file(two_files: list[Path], tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": "a"}, {"text": "", "label": "a"}])
    with pytest.raises(DataError, match=r"c.jsonl: 1 of 2 rows cannot be used; .*\n  row 2: no text in column 'text'"):
        read([*two_files, bad])
    with pytest.raises(RecipeError, match=r"data.weights: 1 for 2 files"):
        read(two_files, data__weights=[2.0])


def test_other_forms_are_mixed_too(tmp_path: Path) -> None:
    examples = read([FORMS / "tagged.jsonl"] * 2, task="tokens", data__weights=[1.0, 0.5], data__validation_rows=2)
    assert examples.train.column_names == ["tokens", "label"]
    chats = [FORMS / "chat.jsonl", FORMS / "sharegpt.jsonl"]
    examples = read(chats, task="instruct", data__validation_rows=4)
    assert examples.shape == "messages" and len(examples.train) == 16
    with pytest.raises(DataError, match=r"the files have several forms: .*chat.jsonl \(messages\), .*alpaca.json"):
        read([chats[0], FORMS / "alpaca.json"], task="instruct")


def test_a_recipe_keeps_the_files(two_files: list[Path]) -> None:
    values = {"model": "m", "data.train": [str(file) for file in two_files], "method.name": "lora"}
    made = make_recipe(values)
    assert (made.data.train, made.data.more) == (str(two_files[0]), [str(two_files[1])])
    assert make_recipe(resolved(made)) == made
    assert set(contents(made)) == {"data.train", f"data.more, {two_files[1]}"}
