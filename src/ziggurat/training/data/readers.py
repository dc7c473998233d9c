"""Files of rows to Arrow tables: csv, tsv, json, text, parquet and xlsx."""

import gzip
import json
import re
import zipfile
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError, first_line, with_article
from ziggurat.extras import require

from .faults import kind_of

#: Byte order marks of text files -> their encoding.
_MARKS = {BOM_UTF8: "utf-8", BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}
PACKED = (".parquet", ".xlsx")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".xlsx")
#: Decoded, a parquet or xlsx file may have this many times its bytes, or `LEAST_DECODED` bytes where that is more.
MOST_GROWTH, LEAST_DECODED = 1000, 2**28
#: Rows of a parquet file that are decoded before their bytes are counted.
COUNTED_ROWS = 1024
MOST_COLUMNS = 1000
#: Labels of text files that are numbers; one with a leading zero, such as a code, is a text.
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?")


def read_lines(path: Path) -> list[str]:
    """The non-blank lines of a text file. Raises DataError if it can't be read."""
    try:
        return _lines(read_bytes(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def _lines(content: bytes) -> list[str]:
    # Not splitlines, which also splits at characters such as U+2028 and U+0085.
    return [line for line in _with_line_feeds(content).split("\n") if line.strip()]


def _with_line_feeds(content: bytes) -> str:
    return content.decode().replace("\r\n", "\n").replace("\r", "\n")


def read_file(
    path: Path,
    texts: Collection[str] = (),
    nested: Collection[str] = (),
    classes: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Any:
    """The Arrow table of a file, by its ending; see `read_table`. Raises DataError with the reason if it can't be
    read."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    readers = {
        ".csv": partial(_csv, texts=texts, classes=classes, delimiter=delimiter),
        ".tsv": partial(_csv, texts=texts, classes=classes, delimiter="\t"),
        **dict.fromkeys((".json", ".jsonl", ".ndjson"), partial(_json, nested=nested)),
        ".txt": _txt,
    }
    packed = {".parquet": read_parquet, ".xlsx": partial(_xlsx, texts=texts)}.get(path.suffix.lower())
    if suffix not in readers and packed is None:
        raise DataError(
            f"{path}: '{suffix}' is not one of the formats read: {', '.join(SUFFIXES)}, or one of them with .gz"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)")
    try:
        if packed is not None:
            return packed(path)
        return readers[suffix](path, content=read_bytes(path, encoding))
    except DataError:
        raise
    except RecursionError as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: its lists and objects nest too deep") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {first_line(error)}") from error


def has_head_line(source: str) -> bool:
    """Whether the first row of this file names its columns."""
    return source.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".xlsx"))


def encoding_of(source: str, encoding: str | None) -> str | None:
    """`encoding`, that of a run's data, if another text file isn't UTF-8; None if it is."""
    path = Path(source).expanduser()
    if encoding is None or not path.is_file():
        return encoding
    try:
        read_bytes(path)
    except DataError:
        return encoding
    return None


def read_bytes(path: Path, encoding: str | None = None) -> bytes:
    """A text file as UTF-8 without a byte order mark; a .gz is decompressed.

    Raises DataError for a .gz that decompresses to too much, or with the line of the first invalid byte.
    """
    content = path.read_bytes() if path.suffix.lower() != ".gz" else _unpacked(path)
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    try:
        text = content.decode(encoding or marked or "utf-8")
    except LookupError as error:
        raise DataError(f"data.encoding: '{encoding}' is no encoding that Python knows") from error
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        named = encoding or marked or "UTF-8"
        raise DataError(
            f"{path} is not in {named}: byte 0x{content[error.start]:02x} in line {line}; save it as UTF-8, or name "
            "its encoding in data.encoding, for example cp1252 or latin-1"
        ) from error
    return content if not marked and encoding is None else text.removeprefix("\ufeff").encode()


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(_most(path) + 1)
    if len(content) > _most(path):
        raise _too_much(path, "; unpack it first")
    return content


def _most(path: Path) -> int:
    """The most bytes that a packed file may decompress to."""
    return max(LEAST_DECODED, MOST_GROWTH * path.stat().st_size)


def _too_much(path: Path, advice: str = "") -> DataError:
    return DataError(f"{path} has {path.stat().st_size:,} bytes and decompresses to more than {_most(path):,}{advice}")


def read_parquet(path: Path) -> Any:
    """The table of a parquet file. Raises DataError if it decompresses to too much."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    limit = f"a file is read to {MOST_GROWTH:,} times its size, at least to {LEAST_DECODED:,} bytes"
    too_much = _too_much(path, f"; {limit}. If it is yours, write it as several")
    with pq.ParquetFile(path) as file:
        # A constant column takes no room in the file, and four bytes a row or more in memory.
        if 4 * file.metadata.num_rows * file.metadata.num_columns > _most(path):
            raise too_much
        plain = pa.schema(
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in file.schema_arrow
        )
        parts, size = [plain.empty_table()], 0
        for batch in file.iter_batches(batch_size=COUNTED_ROWS):
            parts.append(pa.Table.from_batches([batch]).cast(plain))
            size += parts[-1].nbytes
            if size > _most(path):
                raise too_much
        return pa.concat_tables(parts)


def _xlsx(path: Path, texts: Collection[str]) -> Any:
    """The first sheet of a workbook: its first row names the columns; formulas have their saved values.

    Columns `texts`, and those that hold values of several kinds, become texts. Raises MissingExtraError without
    openpyxl.
    """
    require(f"reading {path}", "openpyxl")
    import openpyxl
    import pyarrow as pa

    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > _most(path):
            raise _too_much(path)
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        rows = [list(row) for row in book.worksheets[0].iter_rows(values_only=True)]
    finally:
        book.close()
    while rows and not any(value is not None for value in rows[-1]):  # Excel keeps rows that were emptied
        rows.pop()
    named = [(place, str(name)) for place, name in enumerate(rows[0] if rows else []) if name is not None]
    if not named:
        raise DataError(f"{path}: the first row of its first sheet must name the columns")
    columns = []
    for place, name in named:
        values = [row[place] if place < len(row) else None for row in rows[1:]]
        kinds = {type(value) for value in values if value is not None}
        if name in texts or (len(kinds) > 1 and kinds != {int, float}):
            values = [None if value is None else str(value) for value in values]
        columns.append(pa.array(values, pa.string() if name in texts else None))
    return pa.Table.from_arrays(columns, [name for _, name in named])


def _csv(path: Path, content: bytes, texts: Collection[str], classes: str | None, delimiter: str | None) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    tabs = Path(path.name.lower().removesuffix(".gz")).suffix == ".tsv"
    parse = csv.ParseOptions(
        delimiter=delimiter or first_delimiter(content.partition(b"\n")[0].decode()),
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
    )
    written = dict.fromkeys([*texts, *([classes] if classes is not None else [])], pa.string())
    convert = csv.ConvertOptions(column_types=written)
    # A row must fit into one block, and the first block alone decides the columns' types.
    read = csv.ReadOptions(block_size=min(len(content) + 1, 2**30))
    try:
        table = csv.read_csv(pa.BufferReader(content), read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        hint = "a row needs as many cells as the head line, and a cell with the delimiter or a line break needs quotes"
        if b"\0" in content[:1000]:
            hint = "it looks like UTF-16 without its mark: set data.encoding to utf-16-le or utf-16-be"
        raise DataError(f"{path} cannot be read as csv: {first_line(error)}; {hint}") from error
    if table.column_names.count(classes) == 1 and classes not in texts:
        place = table.column_names.index(classes)
        table = table.set_column(place, classes, _numbers_if_all(table[classes], convert.null_values))
    return table


def first_delimiter(line: str) -> str:
    """The delimiter of a csv file: the most frequent of the usual ones in its first line."""
    line = re.sub(r'"[^"]*"', "", line)
    return max(",;\t|", key=line.count)


def _numbers_if_all(column: Any, missing: Collection[str]) -> Any:
    """A column of texts as numbers if all are numbers, except `missing` ones; else unchanged."""
    import pyarrow as pa

    values = column.to_pylist()
    present = [value for value in values if value not in missing]
    if not present or not all(_NUMBER.fullmatch(value) for value in present):
        return column
    kind = float if any("." in value for value in present) else int
    return pa.array([None if value in missing else kind(value) for value in values])


def _json(path: Path, content: bytes, nested: Collection[str]) -> Any:
    import pyarrow as pa

    text = _with_line_feeds(content).strip()
    if path.name.lower().removesuffix(".gz").endswith(".json") and text.startswith("["):
        rows = json.loads(text)
    else:
        # Not splitlines: JSON texts may contain unescaped characters at which it splits (U+2028, U+0085).
        numbered = json_lines(path, text.split("\n"), "a list of objects, or one object a line")
        rows = [row for _, row in numbered]
    bad = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if bad is not None:
        raise DataError(f"{path}: entry {bad + 1} is {with_article(type(rows[bad]).__name__)}, each must be an object")
    # pyarrow's from_pylist reads the first row's keys only.
    names = dict.fromkeys(name for row in rows for name in row)
    if len(names) > MOST_COLUMNS:
        raise DataError(f"{path}: its objects have {len(names):,} different keys; at most {MOST_COLUMNS:,} are read")
    columns = {}
    for name in names:
        try:
            values = [row.get(name) for row in rows]
            columns[name] = pa.array([as_text_if_nested(value) for value in values] if name in nested else values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            kinds: dict[str, int] = {}
            for number, value in enumerate(values, start=1):
                kinds.setdefault(kind_of(value), number)
            kinds.pop(kind_of(None), None)
            found = ", ".join(f"{kind} in row {number}" for kind, number in kinds.items())
            found = f"{found}; write all alike" if len(kinds) > 1 else first_line(error)
            raise DataError(f"{path}: column '{name}' holds values of several kinds: {found}") from error
    return pa.table(columns)


def json_lines(path: Path, lines: Iterable[str], expected: str) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that isn't blank. Raises DataError with the line that is no JSON."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: {error.msg}; expected {expected}") from error


def as_text_if_nested(value: Any) -> Any:
    """A list of objects as JSON text; Arrow would give every object the keys of all, and take no mixed values."""
    is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return json.dumps(value, ensure_ascii=False) if is_list else value


def _txt(path: Path, content: bytes) -> Any:
    import pyarrow as pa

    return pa.table({"text": pa.array(_lines(content), pa.string())})
