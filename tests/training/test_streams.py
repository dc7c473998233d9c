"""Rows that are read while they are learned from: their choice, order and messages; hub data sets beside files."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from stops import StopAt
from training_tables import tiny_recipe, write_csv, write_jsonl

from ziggurat.errors import DataError, RecipeError
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.callbacks.interrupt import Interrupted
from ziggurat.training.data.examples import Examples, load_examples
from ziggurat.training.loop.run import train

ROWS = [{"prompt": f"say {place} ", "completion": "yes"} for place in range(40)]


def read(*sources: Any, **more: Any) -> Examples:
    values = {
        "model": "m",
        "task": "instruct",
        "method.name": "lora",
        "data.train": [str(source) for source in sources],
    }
    values |= {"data.streaming": True, "train.max_steps": 5, "data.validation_rows": 8, "data.shuffle_buffer": 4}
    return load_examples(make_recipe(values | {key.replace("__", "."): value for key, value in more.items()}))


def first(examples: Examples, count: int) -> list[str]:
    assert examples.stream is not None
    return [row["prompt"].split()[1] for row in islice(examples.stream, count)]


def dataset_folder(folder: Path) -> Path:
    """A folder as data sets lie on the hub: configurations and splits named in its card."""
    folder.mkdir()
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: good\n    path: good.jsonl\n"
    card += "---\n"
    (folder / "README.md").write_text(card)
    write_jsonl(folder / "good.jsonl", ROWS)  # type: ignore[arg-type]
    return folder


def test_the_same_rows_from_every_form_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_csv(tmp_path / "a.csv", ROWS)  # type: ignore[arg-type]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    drawn = [first(read(tmp_path / name), 64) for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet")]
    drawn.append(first(read(f"{dataset_folder(tmp_path / 'set')}:small@good"), 64))
    assert all(rows == drawn[0] for rows in drawn)
    # The first eight are scored on; the others come shuffled, nearly all before the first comes again.
    assert set(drawn[0]) == {str(place) for place in range(8, 40)} and drawn[0][:32] != sorted(drawn[0][:32], key=int)
    assert len(set(drawn[0][:32])) >= 28
    assert [row.split()[1] for row in read(tmp_path / "a.csv").validation["prompt"]] == [str(n) for n in range(8)]


def test_several_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "ask me ", "completion": "no"}] * 3)  # type: ignore[arg-type]
    examples = read(write_jsonl(tmp_path / "a.jsonl", ROWS), other, data__weights=[3.0, 1.0])  # type: ignore[arg-type]
    drawn = first(examples, 400)
    assert 60 < drawn.count("me") < 140
    assert any(note.startswith("data.streaming: rows are read as they are learned from") for note in examples.notes)


def test_bad_rows_are_told_when_they_are_reached(tmp_path: Path) -> None:
    rows: list[Any] = [*ROWS, *[{"prompt": "say x ", "completion": "y"}] * 1000, {"prompt": None, "completion": "yes"}]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a.jsonl, row 1041: the prompt is empty; take it out; or set data.drop_miss"):
        first(read(data), 2000)
    examples = read(data, data__drop_missing=True)
    first(examples, 2000)
    assert examples.stream is not None and examples.stream.lost == {"lack a text or an answer": 1}
    with pytest.raises(DataError, match=r"b.jsonl, line 3: Expecting value; expected one object a line"):
        read(_written(tmp_path / "b.jsonl", '{"prompt": "a", "completion": "b"}\n\nno\n'))
    with pytest.raises(DataError, match=r"c.csv, row 2: more cells than the 2 columns"):
        read(_written(tmp_path / "c.csv", "prompt,completion\na,b\na,b,c\n"))
    with pytest.raises(DataError, match=r"a.json can't be read row by row; .jsonl, "):
        read(_written(tmp_path / "a.json", json.dumps(ROWS)))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("line", "kind"), [("[1]", "a list"), ("1", "an int")])
def test_a_streamed_line_that_is_no_object_is_named_by_its_number(line: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + f"\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows.jsonl, line 3: {kind}, each must be an object"):
        first(read(path, data__validation_rows=1, data__shuffle_buffer=1), 3)


def test_what_a_stream_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read(tmp_path / "a.jsonl", train__max_steps=None, train__epochs=2.0, data__max_train=3)
    for message in (
        "train.max_steps, because the length of a stream is",
        "train.epochs: has no meaning",
        "data.max_train: has no",
    ):
        assert message in str(error.value)


def test_a_resumed_run_goes_on_at_its_row(tiny_llama: Path, tmp_path: Path) -> None:
    words = ["sky", "grass", "film", "story", "music", "plot", "actor", "scene"]
    rows = [{"prompt": f"say {words[place % 8]} ", "completion": words[place * 3 % 8]} for place in range(35)]
    data = write_jsonl(tmp_path / "a.jsonl", rows)  # type: ignore[arg-type]
    how: dict[str, Any] = {
        "task": "instruct", "data__streaming": True, "data__shuffle_buffer": 4, "train__max_steps": 6,
        "train__epochs": None, "train__batch": 3, "train__save": 2, "train__accumulate": 2, "train__answers": 0,
    }  # fmt: skip
    whole = train(tiny_recipe(tiny_llama, data, tmp_path / "whole", **how))
    assert whole.rows == {"train": 36, "validation": 8} and whole.after["loss"] < whole.before["loss"]
    stopped = tiny_recipe(tiny_llama, data, tmp_path / "again", **how)
    with pytest.raises(Interrupted):
        train(stopped, callbacks=[StopAt(5)])
    again = train(tiny_recipe(tiny_llama, data, tmp_path / "again", **how, resume=True))
    assert _weights(again.folder) == _weights(whole.folder)


def _weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_hub_data_sets_stand_among_files(tmp_path: Path) -> None:
    hub = tmp_path / "reviews"
    hub.mkdir()
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.csv\n"
        "  - split: more\n    path: b.csv\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n"
        "  - name: label\n    dtype:\n      class_label:\n        names: {'0': bad, '1': good}\n---\n"
    )
    (hub / "README.md").write_text(card)
    for name in ("a", "b"):
        write_csv(hub / f"{name}.csv", [{"text": f"{name} {place}", "label": place % 2} for place in range(20)])
    file = write_csv(
        tmp_path / "c.csv", [{"text": f"c {place}", "label": ("bad", "good")[place % 2]} for place in range(20)]
    )
    values = {"model": "m", "method.name": "lora", "data.validation_rows": 10, "data.weights": [1.0, 2.0, 0.5]}
    examples = load_examples(make_recipe(values | {"data.train": [str(file), str(hub), f"{hub}@more"]}))
    assert examples.label_names == ["bad", "good"]
    rows = [*zip(examples.train["text"], examples.train["label"], strict=True)]
    assert all(label == int(text.split()[1]) % 2 for text, label in rows)
    counts = {name: sum(text.startswith(name) for text, _ in rows) for name in "abc"}
    left = {name: 20 - sum(text.startswith(name) for text in examples.validation["text"]) for name in "abc"}
    assert counts == {"c": left["c"], "a": 2 * left["a"], "b": round(left["b"] / 2)}
    with pytest.raises(DataError, match=r"split 'no': Unknown split"):
        load_examples(make_recipe(values | {"data.train": [str(file), str(hub), f"{hub}@no"]}))
