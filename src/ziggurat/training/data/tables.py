"""Any table of examples as a `datasets.Dataset`: files, hub data sets, and the embedded demo."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError, first_line
from ziggurat.extras import require
from ziggurat.nearest import did_you_mean, missing_path

from .readers import SUFFIXES, read_file, read_parquet

if TYPE_CHECKING:
    from datasets import Dataset


def is_hub_name(source: str) -> bool:
    """Whether `source` can only be a hub name: it has no data file's suffix and isn't a local path."""
    return source != "demo" and not _looks_like_a_file(source) and not Path(source).expanduser().exists()


def is_one_table(source: str) -> bool:
    """Whether `source` is a single table, without splits and configurations: a file, a saved data set, or the demo."""
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
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Dataset:
    """The rows of `source`.

    Lists of objects in the columns `nested` of json files become JSON texts, which keep the keys that each object has.
    In csv and tsv files the columns `texts` stay as they are written, and so do the labels in the column `classes`
    unless all of them are numbers; of the others, those that hold nothing but numbers, dates or true and false are
    read as such.

    `demo` names the part of the embedded data. csv has quotes and the `delimiter`, else that of its first line; tsv is
    tab-separated without quotes (a quote is an ordinary character there, as in GLUE's files), json a list of objects or
    one object a line. Text files are in `encoding`, else in UTF-8, or UTF-16 with its mark; `.gz` is unpacked.

    Raises DataError if it is missing, unreadable, or has no rows; MissingExtraError without `datasets`.
    """
    require(f"reading {source}", "datasets")
    import datasets

    if source == "demo":
        with as_file(files("ziggurat") / "demo" / f"{demo}.parquet") as path:
            return _from_arrow(read_parquet(path), f"demo ({demo})")
    path = Path(source).expanduser()
    if path.is_file():
        return _from_arrow(read_file(path, texts, nested, classes, encoding, delimiter), str(path))
    if path.is_dir() and (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            raise DataError(f"{source} holds several splits; name one of them: {', '.join(map(str, loaded))}")
        return _not_empty(loaded, source)
    if _looks_like_a_file(source) and not Path(hub_parts(source, None, "")[0]).expanduser().is_dir():
        raise DataError(f"data file {missing_path(source)}")
    name, subset, split = hub_parts(source, subset, split)
    shown = name if subset is None else f"{name} ({subset})"
    return _not_empty(load_hub(name, subset, split), f"{shown}, split '{split}'")


def require_column(table: Dataset, column: str, key: str, source: str) -> None:
    """Raises DataError that lists the columns and the nearest one."""
    if column not in table.column_names:
        hint = did_you_mean(column, table.column_names)
        if len(table.column_names) == 1 and ".csv" in source.lower():
            hint = (
                " (it has one column: put commas between its columns; a recipe can name another character in "
                "data.delimiter)"
            )
        raise DataError(f"{key}: {source} has no column '{column}'{hint}; its columns: {', '.join(table.column_names)}")


def texts_of(table: Dataset, column: str, source: str) -> list[str]:
    """A column as texts. Raises DataError if a row has none, or another kind of value."""
    values = list(table[column])
    missing = [index for index, value in enumerate(values) if value is None or value == "" or str(value).isspace()]
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
    return source.removesuffix(".gz").endswith(SUFFIXES) or source.startswith((".", "/", "~", "\\")) or "\\" in source


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
        # Hive, Impala and older Spark write texts as bytes without marking them as texts.
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            with contextlib.suppress(pa.ArrowInvalid):  # pictures, say; they are refused later if a text is needed
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


def hub_parts(source: str, subset: str | None, split: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a hub data set, which may be written as `owner/name:subset@split`."""
    if Path(source).expanduser().is_dir():
        return source, subset, split
    last = max(source.rfind("/"), source.rfind("\\")) + 1  # folders, and drives of Windows, may have these characters
    name, _, own_split = source[last:].partition("@")
    name, _, own_subset = name.partition(":")
    return source[:last] + name, own_subset or subset, own_split or split


def load_hub(source: str, subset: str | None, split: str, *, streaming: bool = False) -> Any:
    """A hub data set, or a folder with the layout of one. Raises DataError with the reason if it can't be read."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, subset, split = hub_parts(source, subset, split)
    folder = Path(name).expanduser()
    shown = name if subset is None else f"{name} ({subset})"
    try:
        where = str(folder.resolve()) if folder.is_dir() else name
        return datasets.load_dataset(where, subset, split=split, streaming=streaming)
    except ValueError as error:
        # The first line of the error of `datasets` lists the splits or the configurations.
        raise DataError(f"{shown}, split '{split}': {first_line(error)}") from error
    except (OSError, RuntimeError, DatasetsError) as error:
        # A hub data set that cannot be reached is most often a mistyped file name or a machine without network.
        raise DataError(
            f"{missing_path(name)}. Nor could the hub data set '{shown}' be read: "
            f"{first_line(error)}. Name a data file ({', '.join(SUFFIXES)}), `demo`, or a hub data set"
        ) from error
