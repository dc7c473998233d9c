"""Examples from every kind of table, and what is said when they don't fit the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_tables import reviews, write_csv, write_jsonl

from ziggurat.errors import DataError
from ziggurat.training.data import load_examples
from ziggurat.training.instruct import alpaca_prompt
from ziggurat.training.recipe import make_recipe
from ziggurat.training.schema import Recipe

ROWS = reviews(20)


def recipe(train: Path | str, **more: Any) -> Recipe:
    base = {"model": "m", "method.name": "lora", "data.train": str(train)}
    return make_recipe({**base, **{key.replace("__", "."): value for key, value in more.items()}})


def _tables(folder: Path) -> dict[str, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    array = folder / "array.json"
    array.write_text(json.dumps(ROWS))
    tsv = folder / "rows.tsv"
    tsv.write_text("\n".join(["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in ROWS)]))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return {
        "csv": write_csv(folder / "rows.csv", ROWS),
        "tsv": tsv,
        "jsonl": write_jsonl(folder / "rows.jsonl", ROWS),
        "json": array,
        "json lines in .json": write_jsonl(folder / "lines.json", ROWS),
        "parquet": folder / "rows.parquet",
    }


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    for kind, path in _tables(tmp_path).items():
        found = load_examples(recipe(path, data__validation=str(path)))
        assert found.label_names == ["neg", "pos"], kind
        assert list(found.train["text"]) == [row["text"] for row in ROWS], kind
        assert list(found.train["label"]) == [int(row["label"] == "pos") for row in ROWS], kind


def test_quotes_in_tsv_are_signs_and_in_csv_quotes(tmp_path: Path) -> None:
    tsv = tmp_path / "a.tsv"
    tsv.write_text('text\tlabel\n"Never, he said\tx\nso "it" goes\ty\n')
    assert list(load_examples(recipe(tsv, data__validation=str(tsv))).train["text"]) == [
        '"Never, he said',
        'so "it" goes',
    ]
    table = tmp_path / "a.csv"
    table.write_text('text,label\n"one, two\nthree",x\nfour,y\n')
    assert list(load_examples(recipe(table, data__validation=str(table))).train["text"]) == ["one, two\nthree", "four"]


def test_the_split_is_drawn_with_the_seed_and_said(reviews_csv: Path) -> None:
    first = load_examples(recipe(reviews_csv, data__validation_rows=8))
    again = load_examples(recipe(reviews_csv, data__validation_rows=8))
    other = load_examples(recipe(reviews_csv, data__validation_rows=8, seed=1))
    assert (len(first.train), len(first.validation)) == (40, 8)
    assert list(first.validation["text"]) == list(again.validation["text"]) != list(other.validation["text"])
    assert first.notes == ["no validation data named: 8 of 48 rows split off with seed 42"]


def test_max_train_draws_and_says_so(reviews_csv: Path) -> None:
    found = load_examples(recipe(reviews_csv, data__validation=str(reviews_csv), data__max_train=10))
    assert len(found.train) == 10 and found.notes == ["learns from 10 of 48 rows, drawn with seed 42"]


def test_the_embedded_demo() -> None:
    found = load_examples(
        recipe("demo", data__validation="demo", data__text="sentence", data__label_names=["negative", "positive"])
    )
    assert (len(found.train), len(found.validation)) == (9066, 1500)
    assert found.label_names == ["negative", "positive"]


def test_numbered_classes_keep_their_values_as_names(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": 1 + index % 5} for index in range(20)]
    path = write_csv(tmp_path / "stars.csv", rows)
    found = load_examples(recipe(path, data__validation=str(path)))
    assert found.label_names == ["1", "2", "3", "4", "5"]
    assert list(found.train["label"])[:5] == [0, 1, 2, 3, 4]


def test_regression_takes_numbers_and_numbers_in_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "1.5"}, {"text": "b", "label": "2"}])
    found = load_examples(recipe(path, task="regression", data__validation=str(path)))
    assert list(found.train["label"]) == [1.5, 2.0] and found.label_names == []


def _said(made: Recipe) -> str:
    with pytest.raises(DataError) as error:
        load_examples(made)
    return str(error.value)


def test_a_missing_file_names_its_neighbours(reviews_csv: Path) -> None:
    said = _said(recipe(reviews_csv.with_name("review.csv")))
    assert "review.csv' does not exist; nearest in" in said and said.endswith("reviews.csv")
    assert "has no 'nowhere'" in _said(recipe(reviews_csv.parent / "nowhere" / "a.csv"))


def test_a_hub_name_that_cannot_be_reached_offline() -> None:
    said = _said(recipe("no-such-person/no-such-data"))
    assert "Nor could the hub data set 'no-such-person/no-such-data' be read" in said


def test_a_missing_column_lists_the_columns_and_the_nearest(reviews_csv: Path) -> None:
    said = _said(recipe(reviews_csv, data__text="texts"))
    assert said.endswith("has no column 'texts', did you mean text?; its columns: text, label")
    assert "data.label: " in _said(recipe(reviews_csv, data__label="stars"))
    assert "data.text_pair: " in _said(recipe(reviews_csv, data__text_pair="text2"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty (0 bytes)"),
        ("text,label\n", "has no rows"),
        ("text,label\ngood,pos\n ,neg\n", "1 of 2 rows"),
        ("text,label\na,1\nb,1\nc,1\n", "nothing to learn"),
        ("text,label\na,1.5\nb,2\nc,3\n", "set task: regression"),
    ],
)
def test_tables_that_cannot_teach(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert said in _said(recipe(path, data__validation=str(path)))


def test_a_class_only_the_validation_data_have(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", ROWS)
    validation = write_csv(tmp_path / "val.csv", [*ROWS, {"text": "so so", "label": "neutral"}])
    said = _said(recipe(train, data__validation=str(validation)))
    assert "the validation data have 'neutral'" in said and "known: 'neg', 'pos'" in said


def test_more_classes_than_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "a", "label": index % 3} for index in range(9)])
    assert "names 2 classes: no, yes" in _said(
        recipe(path, data__validation=str(path), data__label_names=["no", "yes"])
    )


def test_a_label_that_is_no_number(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "a", "label": "1.0"}, {"text": "b", "label": "high"}])
    said = _said(recipe(path, task="regression", data__validation=str(path)))
    assert "'high' in row 2" in said and "task: classification" in said


def test_broken_json_says_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": \n')
    assert "a.jsonl, line 2: " in _said(recipe(path))


def test_a_validation_split_of_a_file(reviews_csv: Path) -> None:
    assert "is a file and has no splits" in _said(recipe(reviews_csv, data__validation_split="test"))


def test_too_few_rows_to_split(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS[:2])
    assert "leaves none to learn from" in _said(recipe(path, data__validation_rows=2))


INSTRUCT = {
    "prompt": ({"prompt": "name one", "completion": "two"}, "name one", "two"),
    "alpaca": ({"instruction": "name", "input": "one", "output": "two"}, alpaca_prompt("name", "one"), "two"),
    "messages": (
        {"messages": [{"role": "user", "content": "name"}, {"role": "assistant", "content": "two"}]},
        [{"role": "user", "content": "name"}],
        [{"role": "assistant", "content": "two"}],
    ),
}


@pytest.mark.parametrize("shape", INSTRUCT)
def test_the_shapes_of_instruction_data(shape: str, tmp_path: Path) -> None:
    row, prompt, completion = INSTRUCT[shape]
    path = write_jsonl(tmp_path / "a.jsonl", [row, row])
    found = load_examples(recipe(path, task="instruct", data__validation=str(path)))
    assert found.shape == shape
    assert found.train[0] == {"prompt": prompt, "completion": completion}


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "say", "input": "", "output": text} for text in ("one", "", "two", " ", None)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = load_examples(recipe(path, task="instruct", data__validation=str(path)))
    assert list(found.train["completion"]) == list(found.validation["completion"]) == ["one", "two"]
    assert found.notes == [f"left out 3 of 5 rows of {path}: their answer is empty"] * 2


def test_the_alpaca_prompt_has_an_input_section_only_with_an_input() -> None:
    assert "### Input:\nx\n\n### Response:\n" in alpaca_prompt("do", "x")
    assert alpaca_prompt("do", " ") == alpaca_prompt("do") and "Input" not in alpaca_prompt("do")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "answer": "b"}, "needs one of: prompt + completion; instruction + output; messages"),
        ({"prompt": "a", "completion": " "}, "the answer is empty in every row"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must end with a message of the assistant"),
        ({"messages": [{"role": "user"}]}, "each message needs role and content"),
    ],
)
def test_instruction_data_that_do_not_fit(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row, row])
    assert said in _said(recipe(path, task="instruct", data__validation=str(path)))
