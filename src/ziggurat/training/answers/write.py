"""Writing answers to a file, one row each."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError, StorageError
from ziggurat.files.staging import write_whole
from ziggurat.terminal import no_formula

from .predict import Prediction

#: The formats, by the end of the file's name.
ENDINGS = (".csv", ".json", ".jsonl", ".parquet")


def check_ending(out: Path) -> None:
    """Raises DataError for a file of another format."""
    if out.suffix.lower() not in ENDINGS:
        raise DataError(f"--out: '{out}' ends in '{out.suffix}'; {', '.join(ENDINGS)} are written")


def check_place(out: Path) -> None:
    """Raises DataError for a format that isn't written, StorageError for a file of something else than answers."""
    check_ending(out)
    if not out.exists() or not out.stat().st_size:
        return
    try:
        columns = _columns(out)
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration, csv.Error):  # it isn't of this form
        columns = ["?"]
    ours = [name for name in columns if name in ("text", "text_pair", "answer") or name.startswith("probability_")]
    if columns and (ours != columns or not {"text", "answer"} <= {*ours}):
        raise StorageError(f"'{out}' exists and holds no answers of this command; name another file by --out")


def _columns(out: Path) -> list[str]:
    """The columns of a file of answers; none if it holds no row."""
    ending = out.suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(out).names
    with out.open(newline="", encoding="utf-8") as file:
        if ending == ".csv":
            return next(csv.reader(file))
        rows = json.load(file) if ending == ".json" else [json.loads(file.readline())]
    return [name for row in rows[:1] for name in row.keys()]  # noqa: SIM118  a text is no row


def write_answers(out: Path, predictions: Sequence[Prediction], second: Sequence[str] | None) -> None:
    """Columns `text`, `text_pair` (if two), `answer`, and `probability_<class>` of every class.

    In csv a text that a spreadsheet would take for a formula gets a quote in front, and lists are JSON texts. Raises
    StorageError if the file can't be written.
    """
    rows: list[dict[str, Any]] = []
    for place, prediction in enumerate(predictions):
        pair = {} if second is None else {"text_pair": second[place]}
        shares = {f"probability_{name}": share for name, share in (prediction.shares or {}).items()}
        rows.append({"text": prediction.text, **pair, "answer": prediction.answer, **shares})
    ending = out.suffix.lower()
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), content)
        write_whole(out, content.getvalue())
        return
    if ending == ".csv":
        # A text with line breaks is quoted, so a row of the file may be several lines.
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        text = buffer.getvalue()
    elif ending == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(out, text)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else no_formula(value)
