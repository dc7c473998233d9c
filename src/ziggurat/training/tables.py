"""Any table of examples as a `datasets.Dataset`: files, hub data sets, and the embedded demo."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError, first_line
from ziggurat.extras import require

from .nearest import did_you_mean, missing_path

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


def is_hub_name(source: str) -> bool:
    """Whether `source` can only be a hub name: no data file's suffix and nothing of that name on the disk."""
    return source != "demo" and not _looks_like_a_file(source) and not Path(source).expanduser().exists()


def is_one_table(source: str) -> bool:
    """Whether `source` is a table by itself, without splits and configurations: a file, a saved one, or the demo."""
    path = Path(source).expanduser()
    if path.is_dir():
        return (path / "state.json").is_file()
    return source == "demo" or path.is_file() or _looks_like_a_file(source)


def read_table(
    source: str,
    *,
    subset: str | None = None,
    split: str = "train",
    demo: str = "train",
    texts: Collection[str] = (),
) -> Dataset:
    """The rows of `source`.

    In csv and tsv files the columns `texts` stay as they are written; of the others, those that hold nothing but
    numbers, dates or true and false are read as such.

    `demo` names the part of the embedded data. csv is comma-separated with quotes, tsv tab-separated without quotes
    (a quote is a sign like others there, as in GLUE's files), json a list of objects or one object a line.

    Raises DataError when it is missing, unreadable, or has no rows; MissingExtraError without `datasets`.
    """
    require(f"reading {source}", "datasets")
    import datasets

    if source == "demo":
        with as_file(files("ziggurat") / "demo" / f"{demo}.parquet") as path:
            return _from_arrow(_parquet(path), f"demo ({demo})")
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, texts)
    if path.is_dir() and (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            raise DataError(f"{source} holds several splits; name one of them: {', '.join(map(str, loaded))}")
        return _not_empty(loaded, source)
    if _looks_like_a_file(source) and not path.is_dir():
        raise DataError(f"data file {missing_path(source)}")
    return _from_hub(source, subset, split)


def require_column(table: Dataset, column: str, key: str, source: str) -> None:
    """Raises DataError that lists the columns and the nearest one."""
    if column not in table.column_names:
        hint = did_you_mean(column, table.column_names)
        raise DataError(f"{key}: {source} has no column '{column}'{hint}; its columns: {', '.join(table.column_names)}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that aren't blank. Raises DataError if it can't be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    # Not splitlines, which also cuts at signs inside a line, such as U+2028 and U+0085.
    return [line for line in text.split("\n") if line.strip()]


def texts_of(table: Dataset, column: str, source: str) -> list[str]:
    """A column as texts. Raises DataError where a row has none: what a missing value is called is no text."""
    values = list(table[column])
    missing = [index for index, value in enumerate(values) if value is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} rows of {source} have nothing in column '{column}', "
            f"the first is row {missing[0] + 1}; take them out"
        )
    return [str(value) for value in values]


def draw(table: Dataset, count: int | None, seed: int) -> Dataset:
    """At most `count` rows in an order drawn with the seed; all of them in their own order without `count`."""
    if count is None or count >= len(table):
        return table
    return table.shuffle(seed=seed).select(range(count))


def _looks_like_a_file(source: str) -> bool:
    return source.endswith(SUFFIXES) or source.startswith((".", "/", "~", "\\")) or "\\" in source


def _read_file(path: Path, texts: Collection[str]) -> Dataset:
    suffix = path.suffix.lower()
    readers = {
        ".parquet": _parquet,
        ".csv": partial(_csv, texts=texts),
        ".tsv": partial(_csv, texts=texts),
        ".json": _json,
        ".jsonl": _json,
        ".ndjson": _json,
    }
    if suffix not in readers:
        raise DataError(f"{path}: '{suffix}' is not one of the formats read: {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    try:
        table = readers[suffix](path)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {first_line(error)}") from error
    return _from_arrow(table, str(path))


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def _csv(path: Path, texts: Collection[str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    tabs = path.suffix.lower() == ".tsv"
    parse = csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    convert = csv.ConvertOptions(column_types={column: pa.string() for column in texts})
    return csv.read_csv(path, parse_options=parse, convert_options=convert)


def _json(path: Path) -> Any:
    import pyarrow as pa

    text = path.read_text(encoding="utf-8-sig").strip()
    if path.suffix.lower() == ".json" and text.startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        # Not splitlines: JSON leaves signs unescaped inside a text that it takes for ends of lines (U+2028, U+0085).
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: {error.msg}; expected a list of objects, or one object a line"
                    ) from error
    bad = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if bad is not None:
        raise DataError(f"{path}: entry {bad} is a {type(rows[bad]).__name__}, each must be an object")
    # pyarrow's from_pylist takes the first row's keys for those of all rows.
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _from_arrow(table: Any, source: str) -> Dataset:
    from datasets import Dataset

    # pandas leaves its index in parquet files; a column nobody wrote would only show up in messages.
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    return _not_empty(Dataset(table.select(names).replace_schema_metadata(None)), source)


def _not_empty(table: Dataset, source: str) -> Dataset:
    if len(table) == 0:
        raise DataError(f"{source} has no rows")
    return table


def _from_hub(source: str, subset: str | None, split: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    shown = source if subset is None else f"{source} ({subset})"
    try:
        loaded = datasets.load_dataset(source, subset, split=split)
    except ValueError as error:
        # datasets names the splits or the configurations there are; its first line is what a user can act on.
        raise DataError(f"{shown}, split '{split}': {first_line(error)}") from error
    except (OSError, RuntimeError, DatasetsError) as error:
        # A hub data set that cannot be reached is most often a mistyped file name or a machine without network.
        raise DataError(
            f"{missing_path(source)}. Nor could the hub data set '{shown}' be read: "
            f"{first_line(error)}. Name a data file ({', '.join(SUFFIXES)}), `demo`, or a hub data set"
        ) from error
    return _not_empty(loaded, f"{shown}, split '{split}'")  # type: ignore[arg-type]
