"""Examples from every kind of table, and the messages about tables that don't fit the recipe."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn
from training_tables import notes_of, reviews, write_csv, write_jsonl

from word_tokenizer import word_tokenizer
from ziggurat.errors import DataError
from ziggurat.recipe.recipe import make_recipe
from ziggurat.recipe.schema import Recipe
from ziggurat.training.answers.load import Loaded
from ziggurat.training.answers.predict import predict, read_texts
from ziggurat.training.data import readers
from ziggurat.training.data.alpaca import alpaca_prompt
from ziggurat.training.data.examples import class_names, load_examples, load_scored
from ziggurat.training.data.readers import read_lines
from ziggurat.training.data.tables import hub_parts, read_table, texts_of
from ziggurat.training.model.base import HeadSpec

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
        loaded = load_examples(recipe(path, data__validation=str(path)))
        assert loaded.label_names == ["neg", "pos"], kind
        assert list(loaded.train["text"]) == [row["text"] for row in ROWS], kind
        assert list(loaded.train["label"]) == [int(row["label"] == "pos") for row in ROWS], kind


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
    assert first.notes == [
        "no validation data named: 8 of 48 rows split off with seed 42",
        "24 of 48 rows repeat an earlier one; equal rows stay on one side of the split",
        "only 8 rows are scored, where one row more is 12 points: differences may be chance; name validation data",
    ]


def test_max_train_draws_and_says_so(reviews_csv: Path) -> None:
    loaded = load_examples(recipe(reviews_csv, data__validation=str(reviews_csv), data__max_train=10))
    assert len(loaded.train) == 10 and notes_of(loaded) == ["learns from 10 of 48 rows, drawn with seed 42"]


def test_the_embedded_demo() -> None:
    loaded = load_examples(
        recipe("demo", data__validation="demo", data__text="sentence", data__label_names=["negative", "positive"])
    )
    assert (len(loaded.train), len(loaded.validation)) == (9066, 1500)
    assert loaded.label_names == ["negative", "positive"]


def test_numbered_classes_keep_their_values_as_names(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": 1 + index % 5} for index in range(20)]
    path = write_csv(tmp_path / "stars.csv", rows)
    loaded = load_examples(recipe(path, data__validation=str(path)))
    assert loaded.label_names == ["1", "2", "3", "4", "5"]
    assert list(loaded.train["label"])[:5] == [0, 1, 2, 3, 4]


def test_regression_takes_numbers_and_numbers_in_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "1.5"}, {"text": "b", "label": "2"}])
    loaded = load_examples(recipe(path, task="regression", data__validation=str(path)))
    assert list(loaded.train["label"]) == [1.5, 2.0] and loaded.label_names == []


def _message(made: Recipe) -> str:
    with pytest.raises(DataError) as error:
        load_examples(made)
    return str(error.value)


def test_a_missing_file_names_its_neighbours(reviews_csv: Path) -> None:
    message = _message(recipe(reviews_csv.with_name("review.csv")))
    assert "review.csv' does not exist; nearest in" in message and message.endswith("reviews.csv")
    assert "has no 'nowhere'" in _message(recipe(reviews_csv.parent / "nowhere" / "a.csv"))


def test_a_hub_name_that_cannot_be_reached_offline() -> None:
    message = _message(recipe("no-such-person/no-such-data"))
    assert "Nor could the hub data set 'no-such-person/no-such-data' be read" in message


def test_names_of_folders_and_drives_of_windows_are_no_subset(tmp_path: Path) -> None:
    """`@` and `:` stand for a split and a subset behind the last part of a name alone."""
    folder = tmp_path / "me@work:1" / "rows@2"
    folder.mkdir(parents=True)
    write_csv(folder / "train.csv", ROWS)
    assert len(read_table(str(folder))) == len(ROWS) == len(read_table(f"{folder.parent}/../me@work:1/rows@2"))
    for place in ("C:/data/reviews", r"C:\data\reviews"):
        assert hub_parts(place, None, "train") == (place, None, "train")
        assert hub_parts(f"{place}:en@test", None, "train") == (place, "en", "test")
    assert hub_parts("owner/name:en@test", None, "train") == ("owner/name", "en", "test")


def test_a_missing_column_lists_the_columns_and_the_nearest(reviews_csv: Path) -> None:
    message = _message(recipe(reviews_csv, data__text="texts"))
    assert message.endswith("has no column 'texts', did you mean text?; its columns: text, label")
    assert "data.label: " in _message(recipe(reviews_csv, data__label="stars"))
    assert "data.text_pair: " in _message(recipe(reviews_csv, data__text_pair="text2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty (0 bytes)"),
        ("text,label\n", "has no rows"),
        ("text,label\ngood,pos\n ,neg\n", "1 of 2 rows"),
        ("text,label\na,1\nb,1\nc,1\n", "nothing to learn"),
        ("text,label\na,1.5\nb,2\nc,3\n", "set task: regression"),
    ],
)
def test_tables_that_cannot_teach(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert message in _message(recipe(path, data__validation=str(path)))


def test_a_class_only_the_validation_data_have(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", ROWS)
    validation = write_csv(tmp_path / "val.csv", [*ROWS, {"text": "so so", "label": "neutral"}])
    message = _message(recipe(train, data__validation=str(validation)))
    assert "the validation data have 'neutral'" in message and "known: 'neg', 'pos'" in message


def test_more_classes_than_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "a", "label": index % 3} for index in range(9)])
    assert "names 2 classes: no, yes" in _message(
        recipe(path, data__validation=str(path), data__label_names=["no", "yes"])
    )


def test_a_label_that_is_no_number(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "a", "label": "1.0"}, {"text": "b", "label": "high"}])
    message = _message(recipe(path, task="regression", data__validation=str(path)))
    assert "row 2: 'high' in column 'label' is no number" in message


def test_broken_json_says_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": \n')
    assert "a.jsonl, line 2: " in _message(recipe(path))


def test_columns_that_the_first_row_of_json_lacks(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "say", "output": "one"},
        {"instruction": "name", "input": "the sky", "output": "two"},
    ]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows))
    for path in (array, write_jsonl(tmp_path / "a.jsonl", rows)):
        loaded = load_examples(recipe(path, task="instruct", data__validation=str(path)))
        assert list(loaded.train["prompt"]) == [alpaca_prompt("say"), alpaca_prompt("name", "the sky")]
    reversed_rows = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    assert read_table(str(reversed_rows)).to_dict() == read_table(str(array)).select([1, 0]).to_dict()


def test_signs_inside_a_text_that_end_lines_elsewhere(tmp_path: Path) -> None:
    texts = [f"one{sign}two" for sign in ("\u2028", "\u2029", "\x85")] + ["a\nb", "\x0b\x0c\x1c\x1d\x1e"]
    rows = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert list(read_table(str(path))["text"]) == texts
    lines = tmp_path / "a.txt"
    lines.write_bytes("\ufeffone\u2028two\r\n \r\nthree\x85\n".encode())
    assert read_lines(lines) == ["one\u2028two", "three\x85"]
    lines.write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match=r"a\.txt is not in utf-16: .*data\.encoding"):
        read_lines(lines)


def test_instructions_with_and_without_an_input_are_answered_from_one_file(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"instruction": "say"}, {"instruction": "name", "input": "one"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    asked = recipe(path, task="instruct")
    spec, words = HeadSpec("instruct", []), word_tokenizer(["one"], pad_token="[PAD]", unk_token="[UNK]")
    loaded = Loaded(nn.Identity(), words, asked, spec, {"shape": "alpaca"})
    assert read_texts(path, loaded) == (["say", "name"], ["", "one"])
    with pytest.raises(DataError, match="was trained on prompts, which have no input"):
        predict(replace(loaded, run={"shape": "prompt"}), ["say"], ["one"])


def test_a_row_without_a_text_is_refused_and_not_read_as_a_word(tmp_path: Path) -> None:
    table = read_table(str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"other": 1}])))
    with pytest.raises(DataError, match=r"2 of 3 rows of here have nothing in column 'text', the first is row 2"):
        texts_of(table, "text", "here")
    assert texts_of(table.select([0]), "text", "here") == ["a"]


def test_classes_that_two_tables_count_in_two_orders(tmp_path: Path) -> None:
    texts = ["good", "bad", "fine", "poor"]
    for name, order, labels in (("train", ["neg", "pos"], [1, 0, 1, 0]), ("val", ["pos", "neg"], [0, 1, 0, 1])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=order)})
        Dataset.from_dict({"text": texts, "label": labels}, features=features).save_to_disk(tmp_path / name)
    loaded = load_examples(recipe(tmp_path / "train", data__validation=str(tmp_path / "val")))
    assert loaded.label_names == ["neg", "pos"]
    assert list(loaded.train["label"]) == list(loaded.validation["label"]) == [1, 0, 1, 0]
    words = write_csv(
        tmp_path / "a.csv", [{"text": text, "label": ("pos", "neg")[i % 2]} for i, text in enumerate(texts)]
    )
    for other in ({"train": words}, {"train": tmp_path / "train", "data__validation": str(words)}):
        loaded = load_examples(recipe(**{"data__validation": str(tmp_path / "val"), **other}))
        assert list(loaded.train["label"]) == list(loaded.validation["label"]) == [1, 0, 1, 0]


def test_a_validation_split_of_a_file(reviews_csv: Path) -> None:
    assert "is a file and has no splits; name a second" in _message(recipe(reviews_csv, data__validation_split="test"))
    both = {"data__validation": str(reviews_csv), "data__validation_split": "test"}
    assert _message(recipe(reviews_csv, **both)).endswith("is a file and has no splits; drop the key")


def test_keys_of_data_sets_with_parts_are_refused_beside_files(reviews_csv: Path, tmp_path: Path) -> None:
    assert "data.train_split: 'demo' is a file and has no splits" in _message(recipe("demo", data__train_split="test"))
    assert "a file and has no configurations" in _message(recipe(reviews_csv, data__subset="mrpc"))
    # A folder of files has the splits that `datasets` finds in it.
    (tmp_path / "folder").mkdir()
    for name in ("train", "test"):
        write_csv(tmp_path / "folder" / f"{name}.csv", ROWS[: 12 if name == "train" else 8])
    loaded = load_examples(recipe(tmp_path / "folder", data__validation_split="test"))
    assert (len(loaded.train), len(loaded.validation)) == (12, 8)


def test_a_folder_is_read_under_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path)):
        assert len(load_examples(recipe(name)).train) == 18


def test_too_few_rows_to_split(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS[:2])
    assert "leaves none to learn from" in _message(recipe(path, data__validation_rows=2))


def test_labels_of_text_files_stay_text(tmp_path: Path) -> None:
    def labels(*given: str, ending: str = "csv", **more: Any) -> tuple[list[str], list[str]]:
        path, sign = tmp_path / f"labels.{ending}", {"csv": ",", "tsv": "\t"}[ending]
        path.write_text("".join(f"{text}{sign}{label}\n" for text, label in [("text", "label"), *zip("abcd", given)]))
        loaded = load_examples(recipe(path, data__validation=str(path), **more))
        assert class_names(recipe(path, **more)) == loaded.label_names
        return loaded.label_names, [loaded.label_names[place] for place in loaded.train["label"]]

    for ending in ("csv", "tsv"):
        for given in (["007", "7", "007", "x"], ["01:30", "02:00"], ["true", "False"], ["2024-01-05", "b"]):
            assert labels(*given, ending=ending)[1] == given
    # Whole numbers are in their own order, and count the names that the recipe gives.
    assert labels("10", "9", "-1", "9")[0] == ["-1", "9", "10"]
    assert labels("1", "0", data__label_names=["no", "yes"])[1] == ["yes", "no"]
    assert labels("1.0", "2.0")[0] == ["1", "2"]
    with pytest.raises(DataError, match="row 3: no label in column 'label'"):
        labels("1", "2", "NA", "1")


def test_labels_of_a_text_file_match_those_of_a_typed_one(tmp_path: Path) -> None:
    typed = write_jsonl(tmp_path / "val.jsonl", [{"text": "a", "label": 2}, {"text": "b", "label": 1}])
    for labels, names in ((["1", "2"], ["1", "2"]), (["1", "2", "other"], ["1", "2", "other"])):
        rows = [{"text": "t", "label": label} for label in labels]
        train = write_csv(tmp_path / "train.csv", rows)
        loaded = load_examples(recipe(train, data__validation=str(typed)))
        assert loaded.label_names == names and list(loaded.validation["label"]) == [1, 0]
        loaded = load_examples(recipe(typed, data__validation=str(write_csv(tmp_path / "other.csv", rows[:2]))))
        assert list(loaded.validation["label"]) == [0, 1]


def test_texts_that_parquet_holds_as_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def path(texts: list[bytes], labels: list[bytes], kind: Any) -> str:
        table = pa.table({"text": pa.array(texts, kind), "label": pa.array(labels, kind)})
        pq.write_table(table, tmp_path / "bytes.parquet")
        return str(tmp_path / "bytes.parquet")

    texts = ["a good film", "d\u00e9j\u00e0 vu"]
    for kind in (pa.binary(), pa.large_binary()):
        made = path([text.encode() for text in texts], [b"pos", b"neg"], kind)
        loaded = load_examples(recipe(made, data__validation=made))
        assert list(loaded.train["text"]) == texts and loaded.label_names == ["neg", "pos"]
    for made, needed in (([b"\xff"], [b"pos"]), "a text"), (([b"a"], [b"\xff"]), "one class"):
        message = _message(recipe(path(*made, pa.binary())))
        assert f": {needed} is needed, this is bytes that are not UTF-8 throughout" in message
    pq.write_table(pa.table({"prompt": [b"\xff"] * 2, "completion": [b"b"] * 2}), tmp_path / "asked.parquet")
    asked = recipe(tmp_path / "asked.parquet", task="instruct", data__validation=str(tmp_path / "asked.parquet"))
    assert "a text is needed, this is bytes that are not UTF-8 throughout" in _message(asked)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nne,1\n\xe7a va,2\n", "is not in UTF-8: byte 0xe7 in line 3; save it as UTF-8"),
        ("a.jsonl", b'{"text": "\xe7a"}', "is not in UTF-8: byte 0xe7 in line 1"),
        ("a.csv", b"text,label\nne,\xc3", "is not in UTF-8: byte 0xc3 in line 2"),
        ("a.csv", "text,label\n".encode("utf-16"), "a.csv has no rows"),
        ("a.xls", b"x", "'.xls' is not one of the formats read: .csv, .tsv"),
        ("a.csv.gz", b"text,label", "a.csv.gz cannot be read as csv: Not a gzipped file"),
        ("a.csv", b"text,label,text\na,1,b\n", "has more than one column called 'text'; rename or drop all but one"),
        ("a.csv", b"text#label\na#1\n", "has no column 'text' (it has one column: put commas between"),
        ("a.json", b"[" * 100_000, "its lists and objects nest too deep"),
        ("a.jsonl", b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}", "its lists and objects nest too deep"),
    ],
)
def test_files_that_cannot_be_read_say_why(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in _message(recipe(tmp_path / name))


def test_a_field_of_many_mebibytes_and_a_column_that_changes_its_kind_late(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "a" * 3_000_000, "label": "x", "number": 1}]
    rows += [{"text": "b" * 100, "label": "y", "number": 2}] * 20_000 + [{"text": "c", "label": "x", "number": "three"}]
    path = write_csv(tmp_path / "wide.csv", rows)
    assert len(load_examples(recipe(path, data__validation=str(path))).train["text"][0]) == 3_000_000


def test_maps_are_refused_by_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.map_(pa.string(), pa.string())
    pq.write_table(pa.table({"text": ["a"], "extra": pa.array([[("k", "v")]], kind)}), tmp_path / "a.parquet")
    message = _message(recipe(tmp_path / "a.parquet"))
    assert "holds maps in 'extra', which are not read: take them out" in message


def test_a_small_file_that_stands_for_very_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(readers, "LEAST_DECODED", 2**20)
    monkeypatch.setattr(readers, "MOST_GROWTH", 10)
    long = pa.array(["a" * 1000] * 2000)
    for name, column in (("long", long), ("category", long.dictionary_encode()), ("many", pa.nulls(300_000, "string"))):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"text": column}), path, compression="zstd")
        assert path.stat().st_size < 10_000
        message = _message(recipe(path))
        assert (
            f"bytes and decompresses to more than {2**20:,}; a file is read to 10 times its size, at least to"
            in message
        )
    monkeypatch.setattr(readers, "LEAST_DECODED", 2**28)
    assert list(read_table(str(tmp_path / "category.parquet"))["text"]) == long.to_pylist()


def test_objects_with_thousands_of_keys_are_no_table(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "keys.jsonl", [{f"k{index}": 1} for index in range(2000)])
    assert "its objects have 2,000 different keys; at most 1,000 are read" in _message(recipe(path))


def test_errors_name_rows_of_the_file_whatever_the_split(tmp_path: Path) -> None:
    rows = reviews(40)
    for seed in (7, 42):
        blank = [{**row, "text": "" if index == 8 else row["text"]} for index, row in enumerate(rows)]
        path = write_csv(tmp_path / "blank.csv", blank)
        assert "blank.csv: 1 of 40 rows cannot be used; take them out of the file" in _message(recipe(path, seed=seed))
        assert "\n  row 9: no text in column 'text' (data.text)" in _message(recipe(path, seed=seed))
        asked: list[dict[str, object]] = [{"prompt": "a", "completion": "b"} for _ in range(40)]
        asked[8]["prompt"] = None
        message = _message(recipe(write_jsonl(tmp_path / "asked.jsonl", asked), task="instruct", seed=seed))
        assert message.endswith("row 9: the prompt is empty")


INSTRUCT = {
    "prompt": ({"prompt": "name one", "completion": "two"}, "name one", "two"),
    "alpaca": ({"instruction": "name", "input": "one", "output": "two"}, alpaca_prompt("name", "one"), "two"),
    "messages": (
        {"messages": [{"role": "user", "content": "name"}, {"role": "assistant", "content": "two"}]},
        [{"role": "user", "content": "name"}],
        [{"role": "assistant", "content": "two"}],
    ),
}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_texts_stay_as_they_are_written(ending: str, tmp_path: Path) -> None:
    path, sign = tmp_path / f"sums.{ending}", {"csv": ",", "tsv": "\t"}[ending]
    rows = [["instruction", "input", "output"], ["add", "007", "1.50"], ["true", "2024-01-05", "8.00"]]
    path.write_text("".join(sign.join(row) + "\n" for row in rows))
    loaded = load_examples(recipe(path, task="instruct", data__validation=str(path)))
    assert list(loaded.train["prompt"]) == [alpaca_prompt("add", "007"), alpaca_prompt("true", "2024-01-05")]
    assert list(loaded.train["completion"]) == ["1.50", "8.00"]
    scored = recipe(path, data__validation=str(path), data__text="input", data__label="output", task="regression")
    examples = load_examples(scored)
    assert list(examples.train["text"]) == ["007", "2024-01-05"] and list(examples.train["label"]) == [1.5, 8.0]


def test_columns_of_numbers_in_json_are_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "1 + 2", "completion": 3}])
    loaded = load_examples(recipe(path, task="instruct", data__validation=str(path)))
    assert list(loaded.train["completion"]) == ["3"]


@pytest.mark.parametrize("shape", INSTRUCT)
def test_the_shapes_of_instruction_data(shape: str, tmp_path: Path) -> None:
    row, prompt, completion = INSTRUCT[shape]
    path = write_jsonl(tmp_path / "a.jsonl", [row, row])
    loaded = load_examples(recipe(path, task="instruct", data__validation=str(path)))
    assert loaded.shape == shape
    made = {name: value for name, value in loaded.train[0].items() if name in ("prompt", "completion", "messages")}
    if shape == "messages":
        assert json.loads(made["messages"]) == [*prompt, *completion]
    else:
        assert made == {"prompt": prompt, "completion": completion}


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "say", "input": "", "output": text} for text in ("one", "", "two", " ", None)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_examples(recipe(path, task="instruct", data__validation=str(path)))
    assert list(loaded.train["completion"]) == list(loaded.validation["completion"]) == ["one", "two"]
    assert list(loaded.train["row"]) == [1, 3]  # rows of the file
    assert notes_of(loaded) == [f"left out 3 of 5 rows of {path}: their answer is empty"] * 2


def test_the_alpaca_prompt_has_an_input_section_only_with_an_input() -> None:
    assert alpaca_prompt("do", "x").endswith("### Input:\nx\n\n### Response:")
    assert alpaca_prompt("do", " ") == alpaca_prompt("do") and "Input" not in alpaca_prompt("do")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"said": "a", "then": "b"}, "needs one of: prompt + completion; instruction + output; messages; text"),
        ({"prompt": "a", "completion": " "}, "the answer is empty in every row"),
        ({"messages": [{"role": "user", "content": "a"}]}, "rows 1, 2: no message of the assistant"),
        ({"messages": [{"role": "user"}]}, "each message needs role and content"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            "each message needs role and content",
        ),
        ({"instruction": None, "output": "b"}, "the prompt is empty"),
    ],
)
def test_instruction_data_that_do_not_fit(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row, row])
    assert message in _message(recipe(path, task="instruct", data__validation=str(path)))


def test_the_split_has_every_class_and_keeps_rare_ones_in_training(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": "abc"[index % 10 // 6 + index % 10 // 9]} for index in range(100)]
    path = write_csv(tmp_path / "a.csv", [*rows, {"text": "so so", "label": "rare"}])
    for seed in range(12):
        loaded = load_examples(recipe(path, seed=seed))
        counts = [list(loaded.validation["label"]).count(place) for place in range(4)]
        assert counts == [6, 3, 1, 0] and 3 in loaded.train["label"]
        assert loaded.label_names == ["a", "b", "c", "rare"] == class_names(recipe(path))


def test_equal_rows_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = [{"text": f"t{index // 3}", "label": index // 3 % 2} for index in range(90)]
    for seed in range(6):
        loaded = load_examples(recipe(write_csv(tmp_path / "a.csv", rows), seed=seed))
        assert len(loaded.validation) == 6 + 3 * (len(loaded.validation) == 9)
        assert not set(loaded.train["text"]) & set(loaded.validation["text"])
        assert "60 of 90 rows repeat an earlier one; equal rows stay on one side of the split" in loaded.notes
    same = write_csv(tmp_path / "b.csv", [{"text": "a", "label": index % 2} for index in range(10)])
    assert "9 of 10 rows repeat an earlier one, on both sides of the split" in load_examples(recipe(same)).notes
    lone = write_csv(tmp_path / "c.csv", [{"text": f"t{index}", "label": f"c{index}"} for index in range(9)])
    assert "every class would lose its only row; name validation data" in _message(recipe(lone))


def test_few_scored_rows_are_told(tmp_path: Path) -> None:
    for count, few in ((490, True), (500, False)):
        rows = [{"text": f"t{index}", "label": index % 2} for index in range(count)]
        notes = load_examples(recipe(write_csv(tmp_path / "a.csv", rows))).notes
        assert len(notes) == 1 + few and (notes[-1].startswith("only 49 rows are scored, where one row") or not few)


def test_all_bad_rows_of_a_file_are_counted_at_once(tmp_path: Path) -> None:
    rows = reviews(40)
    for index in range(3, 12):
        rows[index]["text"] = " "
    rows[5]["label"] = rows[20]["label"] = ""
    path = write_csv(tmp_path / "a.csv", rows)
    assert _message(recipe(path)).splitlines() == [
        f"{path}: 10 of 40 rows cannot be used; take them out of the file, or set data.drop_missing: true",
        "  rows 4, 5, 6, 7, 8 and 4 more: no text in column 'text' (data.text)",
        "  rows 6, 21: no label in column 'label'",
    ]
    loaded = load_examples(recipe(path, data__drop_missing=True, data__validation=str(path)))
    assert len(loaded.train) == len(loaded.validation) == 30 and "" not in loaded.label_names
    assert loaded.notes[0] == (
        f"data.drop_missing leaves out 10 of 40 rows of {path}: no text in column 'text' (data.text) (rows 4, 5, 6, "
        "7, 8 and 4 more); no label in column 'label' (rows 6, 21)"
    )
    assert class_names(recipe(path, data__drop_missing=True)) == ["neg", "pos"]
    table = write_csv(tmp_path / "b.csv", [{"text": "a", "label": label} for label in ("1.5", "", "high", "2")])
    dropping = recipe(table, task="regression", data__drop_missing=True)
    assert "1 of 4 rows cannot be used; mend them, or take them out\n  row 3: 'high'" in _message(dropping)
    empty = write_csv(tmp_path / "c.csv", [{"text": "", "label": 1}] * 2)
    assert _message(recipe(empty, data__drop_missing=True)).endswith("none is left")


def test_labels_that_differ_by_case_or_blanks_are_asked_about(tmp_path: Path) -> None:
    labels = ["account", "ACCOUNT ", "account", "billing", "Billing", "billing", "other"]
    path = write_csv(tmp_path / "a.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    message = _message(recipe(path, data__validation=str(path)))
    assert "'account' (4 rows) and 'ACCOUNT ' (2 rows); 'billing' (4 rows) and 'Billing' (2 rows); set" in message
    merged = recipe(path, data__validation=str(path), data__similar_labels="merge")
    loaded = load_examples(merged)
    assert loaded.label_names == ["account", "billing", "other"] == class_names(merged)
    assert list(loaded.train["label"]) == [0, 0, 0, 1, 1, 1, 2]
    kept = load_examples(recipe(path, data__validation=str(path), data__similar_labels="keep"))
    assert len(kept.label_names) == 5
    # The names of the recipe are spellings, too, and so are the validation data's.
    named = {"data__similar_labels": "merge", "data__label_names": ["Billing", "Account", "other"]}
    assert list(load_examples(recipe(path, data__validation=str(path), **named)).train["label"])[:4] == [1, 1, 1, 0]
    plain = write_csv(tmp_path / "b.csv", [{"text": "a", "label": label} for label in ("account", "billing")])
    other = write_csv(tmp_path / "c.csv", [{"text": "a", "label": "Account"}])
    assert "'account' (1 row) and 'Account' (1 row)" in _message(recipe(plain, data__validation=str(other)))


@pytest.mark.parametrize(
    ("name", "encoding", "sign", "keys"),
    [
        ("a.csv", "utf-8", ";", {}),
        ("a.csv", "utf-8-sig", "|", {}),
        ("a.csv", "utf-16", "\t", {}),
        ("a.csv", "cp1252", ";", {"data__encoding": "cp1252"}),
        ("a.csv", "utf-8", "#", {"data__delimiter": "#"}),
        ("a.csv.gz", "utf-8", ",", {}),
        ("a.tsv.gz", "utf-16", "\t", {}),
    ],
)
def test_csv_of_any_delimiter_and_encoding(
    name: str, encoding: str, sign: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    texts = ["d\u00e9j\u00e0 vu", "na\u00efve"]
    content = f"text{sign}label\n{texts[0]}{sign}ja\n{texts[1]}{sign}nein\n".encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    loaded = load_examples(recipe(path, data__validation=str(path), **keys))
    assert list(loaded.train["text"]) == texts and loaded.label_names == ["ja", "nein"]
    if encoding == "cp1252":
        assert "is not in UTF-8: byte 0xe9 in line 2; save it as UTF-8, or name its encoding" in _message(recipe(path))
        assert "data.encoding: 'latin-x' is no encoding" in _message(recipe(path, data__encoding="latin-x"))


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_another_file_than_the_runs_may_be_utf_8_or_in_the_runs_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "later.csv"
    path.write_bytes("text,label\nd\u00e9j\u00e0 vu,ja\n".encode(encoding))
    trained = recipe(tmp_path / "own.csv", data__encoding="cp1252")
    table, _, _ = load_scored(trained, str(path), ["ja", "nein"])
    assert list(table["text"]) == ["d\u00e9j\u00e0 vu"]
    loaded = Loaded(
        nn.Identity(),
        word_tokenizer(["ja"], unk_token="[UNK]"),
        trained,
        HeadSpec("classification", ["ja", "nein"]),
        {},
    )
    assert read_texts(path, loaded)[0] == ["d\u00e9j\u00e0 vu"]


def test_a_commas_file_with_semicolons_in_its_texts_has_commas(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label,"a;b;c;d"\nx;y;z,1,\nu;v,2,\n')
    assert list(read_table(str(path))["text"]) == ["x;y;z", "u;v"]


def test_packed_files_that_stand_for_very_much_and_packed_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    assert list(read_table(str(path))["text"]) == [row["text"] for row in ROWS]
    monkeypatch.setattr(readers, "LEAST_DECODED", 2**10)
    monkeypatch.setattr(readers, "MOST_GROWTH", 10)
    path.write_bytes(gzip.compress(b" " * 2**20))
    assert "a.jsonl.gz has 1,0" in _message(recipe(path)) and "decompresses to more than" in _message(recipe(path))
