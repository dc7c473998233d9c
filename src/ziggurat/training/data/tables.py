"""Any table of examples as a `datasets.Dataset`: files, hub data sets, and the embedded demo."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections import Counter
from collections.abc import Collection
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError, first_line
from ziggurat.extras import require
from ziggurat.nearest import did_you_mean, missing_path

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")
#: Decoded, a parquet file may have this many times its bytes, or `LEAST_DECODED` bytes where that is more.
MOST_GROWTH, LEAST_DECODED = 1000, 2**28
#: Rows of a parquet file that are decoded before their bytes are counted.
COUNTED_ROWS = 1024
MOST_COLUMNS = 1000
#: Labels of text files that are numbers; one with a leading zero, such as a code, is a text.
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?")


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
    nested: Collection[str] = (),
    classes: str | None = None,
) -> Dataset:
    """The rows of `source`.

    Lists of objects in the columns `nested` of json files become JSON texts, which keep the keys that each object has.
    In csv and tsv files the columns `texts` stay as they are written, and so do the labels in the column `classes`
    unless all of them are numbers; of the others, those that hold nothing but numbers, dates or true and false are
    read as such.

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
        return _read_file(path, texts, nested, classes)
    if path.is_dir() and (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            raise DataError(f"{source} holds several splits; name one of them: {', '.join(map(str, loaded))}")
        return _not_empty(loaded, source)
    if _looks_like_a_file(source) and not path.is_dir():
        raise DataError(f"data file {missing_path(source)}")
    return _from_hub(str(path.resolve()) if path.is_dir() else source, subset, split)


def require_column(table: Dataset, column: str, key: str, source: str) -> None:
    """Raises DataError that lists the columns and the nearest one."""
    if column not in table.column_names:
        hint = did_you_mean(column, table.column_names)
        if len(table.column_names) == 1 and source.lower().endswith(".csv") and ";" in table.column_names[0]:
            hint = " (csv is read with commas between its columns, and this seems to have semicolons)"
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
    """A column as texts. Raises DataError where a row has none, or something else: what stands for it is no text."""
    values = list(table[column])
    missing = [index for index, value in enumerate(values) if value is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} rows of {source} have nothing in column '{column}', "
            f"the first is row {missing[0] + 1}; take them out"
        )
    odd = next((index for index, value in enumerate(values) if isinstance(value, list | dict | bytes)), None)
    if odd is not None:
        kind = type(values[odd]).__name__
        raise DataError(f"{source}, column '{column}', row {odd + 1}: a text is needed, this is of type {kind}")
    return [str(value) for value in values]


def draw(table: Dataset, count: int | None, seed: int) -> Dataset:
    """At most `count` rows in an order drawn with the seed; all of them in their own order without `count`."""
    if count is None or count >= len(table):
        return table
    return table.shuffle(seed=seed).select(range(count))


def _looks_like_a_file(source: str) -> bool:
    return source.endswith(SUFFIXES) or source.startswith((".", "/", "~", "\\")) or "\\" in source


def _read_file(path: Path, texts: Collection[str], nested: Collection[str], classes: str | None) -> Dataset:
    suffix = path.suffix.lower()
    readers = {
        ".parquet": _parquet,
        ".csv": partial(_csv, texts=texts, classes=classes),
        ".tsv": partial(_csv, texts=texts, classes=classes),
        **dict.fromkeys((".json", ".jsonl", ".ndjson"), partial(_json, nested=nested)),
        ".txt": _txt,
    }
    if suffix not in readers:
        raise DataError(f"{path}: '{suffix}' is not one of the formats read: {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    try:
        if suffix != ".parquet":
            _check_encoding(path)
        return _from_arrow(readers[suffix](path), str(path))
    except DataError:
        raise
    except RecursionError as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: its lists and objects nest too deep") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {first_line(error)}") from error


def _check_encoding(path: Path) -> None:
    """Raises DataError with the line of the first byte that is no UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with path.open("rb") as file:
        part = b"-"
        while part:
            part = file.read(2**20)
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise DataError(
                    f"{path} is not in UTF-8: byte 0x{error.object[error.start]:02x} in line {line}; save it as UTF-8"
                ) from error
            line += part.count(b"\n")


def _parquet(path: Path) -> Any:
    """The table of a parquet file, whose few bytes may stand for very many. Raises DataError if they do."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    most = max(LEAST_DECODED, MOST_GROWTH * path.stat().st_size)
    too_much = DataError(
        f"{path} has {path.stat().st_size:,} bytes and stands for more than {most:,}; a file is read to "
        f"{MOST_GROWTH:,} times its size, at least to {LEAST_DECODED:,} bytes. If it is yours, write it as several"
    )
    with pq.ParquetFile(path) as file:
        # A column that never changes takes no room in the file, and four bytes a row or more in memory.
        if 4 * file.metadata.num_rows * file.metadata.num_columns > most:
            raise too_much
        plain = pa.schema(
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in file.schema_arrow
        )
        parts, size = [plain.empty_table()], 0
        for batch in file.iter_batches(batch_size=COUNTED_ROWS):
            parts.append(pa.Table.from_batches([batch]).cast(plain))
            size += parts[-1].nbytes
            if size > most:
                raise too_much
        return pa.concat_tables(parts)


def _csv(path: Path, texts: Collection[str], classes: str | None) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    tabs = path.suffix.lower() == ".tsv"
    parse = csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    written = dict.fromkeys([*texts, *([classes] if classes is not None else [])], pa.string())
    convert = csv.ConvertOptions(column_types=written)
    # A row must fit into one block, and the first block alone decides what a column holds.
    read = csv.ReadOptions(block_size=min(path.stat().st_size + 1, 2**30))
    table = csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    if table.column_names.count(classes) == 1 and classes not in texts:
        place = table.column_names.index(classes)
        table = table.set_column(place, classes, _numbers_if_all(table[classes], convert.null_values))
    return table


def _numbers_if_all(column: Any, missing: Collection[str]) -> Any:
    """A column of texts as numbers where all of it are, `missing` ones apart; else as it is."""
    import pyarrow as pa

    values = column.to_pylist()
    given = [value for value in values if value not in missing]
    if not given or not all(_NUMBER.fullmatch(value) for value in given):
        return column
    kind = float if any("." in value for value in given) else int
    return pa.array([None if value in missing else kind(value) for value in values])


def _json(path: Path, nested: Collection[str]) -> Any:
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
    if len(names) > MOST_COLUMNS:
        raise DataError(f"{path}: its objects have {len(names):,} different keys; at most {MOST_COLUMNS:,} are read")
    columns = {}
    for name in names:
        try:
            values = [row.get(name) for row in rows]
            columns[name] = pa.array([_as_text(value) for value in values] if name in nested else values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{path}: column '{name}' holds values of several kinds: {first_line(error)}") from error
    return pa.table(columns)


def _as_text(value: Any) -> Any:
    """A list of objects as JSON text; Arrow would give every object the keys of all, and take no mixed values."""
    is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return json.dumps(value, ensure_ascii=False) if is_list else value


def _txt(path: Path) -> Any:
    import pyarrow as pa

    return pa.table({"text": pa.array(read_lines(path), pa.string())})


def _from_arrow(table: Any, source: str) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    twice = [repr(name) for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise DataError(f"{source} has more than one column called {', '.join(twice)}; rename or drop all but one")
    # pandas leaves its index in parquet files; a column nobody wrote would only show up in messages.
    table = table.select([name for name in table.column_names if not name.startswith("__index_level_")])
    maps = [f"'{field.name}'" for field in table.schema if _has_map(field.type)]
    if maps:
        where = ", ".join(maps)
        raise DataError(f"{source} holds maps in {where}, which are not read: take them out, or write them as objects")
    for place, field in enumerate(table.schema):
        # Hive, Impala and older Spark write texts as bytes without a word that they are texts.
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            with contextlib.suppress(pa.ArrowInvalid):  # pictures, say; where a text is needed they are refused
                table = table.set_column(place, field.name, table[place].cast(pa.string()))
    return _not_empty(Dataset(table.replace_schema_metadata(None)), source)


def _has_map(kind: Any) -> bool:
    """Whether an Arrow type is a map, or a list or a struct that holds one."""
    import pyarrow as pa

    return pa.types.is_map(kind) or any(_has_map(kind.field(place).type) for place in range(kind.num_fields))


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
