"""Workbooks as data."""

import importlib.util
from pathlib import Path

import pytest
from training_tables import tiny_recipe

from ziggurat.errors import DataError, MissingExtraError
from ziggurat.training.data.examples import load_examples
from ziggurat.training.data.tables import read_table


def test_the_first_sheet_of_a_workbook(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["text", "label", None, "mixed"], ["good", 1, "x", 1], [7, 0, None, "a"], ["bad", 0], [None, None]):
        book.active.append(row)
    book.create_sheet("other").append(["not", "read"])
    path = tmp_path / "a.xlsx"
    book.save(path)
    table = read_table(str(path), texts=["text"])
    assert table.to_dict() == {"text": ["good", "7", "bad"], "label": [1, 0, 0], "mixed": ["1", "a", None]}
    examples = load_examples(
        tiny_recipe(Path("m"), path, tmp_path, data__validation=str(path), data__validation_rows=None)
    )
    assert examples.label_names == ["0", "1"] and list(examples.train["label"]) == [1, 0, 0]
    openpyxl.Workbook().save(path)
    with pytest.raises(DataError, match=r"a.xlsx: the first row of its first sheet must name the columns"):
        read_table(str(path))
    path.write_bytes(b"no workbook")
    with pytest.raises(DataError, match=r"a.xlsx cannot be read as xlsx: File is not a zip file"):
        read_table(str(path))


def test_long_numbers_and_error_cells_of_a_workbook(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ["text", "number", "mixed", "label"],
        ["#DIV/0!", 12345678901234567890, 1e17, "#N/A"],
        ["b", 3, 2.5, "x"],
    ):
        book.active.append(row)
    path = tmp_path / "a.xlsx"
    book.save(path)
    table = read_table(str(path), texts=["text"]).to_dict()
    assert (table["text"], table["label"]) == (["#DIV/0!", "b"], ["#N/A", "x"])
    assert table["number"] == pytest.approx([12345678901234567890, 3]) and table["mixed"] == [1e17, 2.5]


def test_without_openpyxl_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openpyxl" else find_spec(name))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(MissingExtraError, match=r"reading .*a.xlsx needs .*openpyxl.*pip install openpyxl"):
        read_table(str(tmp_path / "a.xlsx"))
