"""Answers as a file with a row for each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError
from ziggurat.files.staging import told_of_storage, write_whole

from .predict import Prediction

#: What the file's name may end in.
ENDINGS = (".csv", ".json", ".jsonl", ".parquet")


def check_ending(out: Path) -> None:
    """Raises DataError for a file of another form."""
    if out.suffix.lower() not in ENDINGS:
        raise DataError(f"--out: '{out}' ends in '{out.suffix}'; {', '.join(ENDINGS)} are written")


def write_answers(out: Path, predictions: Sequence[Prediction], second: Sequence[str] | None) -> None:
    """Columns `text`, `text_pair` (if two), `answer`, and `probability_<class>` of every class.

    Raises StorageError where the disk doesn't take the file.
    """
    rows: list[dict[str, Any]] = []
    for place, found in enumerate(predictions):
        pair = {} if second is None else {"text_pair": second[place]}
        shares = {f"probability_{name}": share for name, share in (found.shares or {}).items()}
        rows.append({"text": found.text, **pair, "answer": found.answer, **shares})
    ending = out.suffix.lower()
    if ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with told_of_storage(out):
            pq.write_table(pa.Table.from_pylist(rows), out)
        return
    if ending == ".csv":
        # A text with line breaks stands in quotes, so a row of the file may be several lines.
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif ending == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(out, text)
