"""Instruction rows that are read during training, for data that don't fit into memory."""

import csv
import gzip
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ziggurat.errors import DataError, first_line, with_article
from ziggurat.nearest import missing_path
from ziggurat.recipe.schema import Recipe

from .examples import Examples, load_scored
from .faults import RowFault
from .instruct import RowReader, reader_of, to_rows
from .readers import as_text_if_nested, first_delimiter, json_lines
from .tables import draw, hub_parts, is_hub_name, load_hub

#: Rows at the start of a source that decide columns, form and length; and validation rows if none are named.
SEEN, SCORED = 1000, 200

Row = dict[str, Any]


@dataclass
class Stream:
    """The rows of one or several sources, endlessly, in an order given by the seed.

    `readers`: the reader of each of the recipe's sources; `skips`: the number of rows at its start that are not learned
    from. `lost` counts the rows left out since an iteration began.
    """

    recipe: Recipe
    readers: list[RowReader]
    skips: list[int]
    lost: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Row]:
        """The rows in the form of `instruct.to_rows`. Raises DataError that names an unusable row."""
        self.lost.clear()
        draws, buffer = random.Random(self.recipe.seed), list[Row]()  # noqa: S311
        rows, size = self._mixed(), self.recipe.data.shuffle_buffer
        for row in rows:
            buffer.append(row)
            if len(buffer) >= size:
                place = draws.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield buffer.pop()

    def _mixed(self) -> Iterator[Row]:
        draws, weights = random.Random(self.recipe.seed), self.recipe.data.weights  # noqa: S311
        each = list(map(self._endless, self.recipe.data.sources, self.readers, self.skips))
        while True:
            (rows,) = draws.choices(each, weights) if len(each) > 1 else each
            yield next(rows)

    def _endless(self, source: str, reader: RowReader, skip: int) -> Iterator[Row]:
        while True:
            learned = 0
            for number, row in islice(enumerate(rows_of(self.recipe, source), start=1), skip, None):
                try:
                    made = reader.read(row)
                except RowFault as fault:
                    if not (fault.gap and self.recipe.data.drop_missing):
                        do = "; or set data.drop_missing: true" if fault.gap else ""
                        raise DataError(f"{source}, row {number}: {fault}; take it out{do}") from fault
                    made = None
                if made is None:
                    self.lost["lack a text or an answer"] += 1
                    continue
                learned += 1
                yield {**made, "row": number}
            if not learned:
                raise DataError(f"{source}: no row is left to learn from")


def load_stream(recipe: Recipe) -> Examples:
    """The rows at the start of a recipe's data, and the stream of all others.

    Raises DataError as `load_examples` does for these rows, for images, and for files that can't be read row by row.
    """
    from datasets import Dataset

    data, notes = recipe.data, list[str]()
    sources = data.sources
    scored = 0 if data.validation is not None else data.validation_rows or SCORED
    skips = [scored, *(0 for _ in sources[1:])]
    tables, forms, readers = [], [], []
    for source, skip in zip(sources, skips, strict=True):
        rows = list(islice(rows_of(recipe, source), SEEN + skip))
        if len(rows) <= skip:
            raise DataError(f"{source} has {len(rows)} rows, too few to stream; take data.streaming out")
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [as_text_if_nested(row.get(name)) for row in rows] for name in names}
        try:
            table = Dataset.from_dict(columns)
        except (ValueError, TypeError) as error:
            raise DataError(f"{source}: a column holds values of several kinds: {first_line(error)}") from error
        made, shape, remarks = to_rows(recipe, table, source)
        if "images" in made.column_names:
            raise DataError(f"data.streaming: {source} has images, and streams are of texts alone")
        tables.append(made)
        forms.append(shape)
        readers.append(reader_of(recipe, table, source))
        notes += [f"in its first rows: {remark}" for remark in remarks]
    if len(set(forms)) > 1:
        raise DataError(f"data.train: the sources have several forms: {', '.join(forms)}")
    if data.validation is not None:
        validation, _, remarks = load_scored(recipe, data.validation, [])
        notes += remarks
        train = tables[0]
    else:
        first = [place for place, number in enumerate(tables[0]["row"]) if number <= scored]
        validation = tables[0].select(first)
        train = tables[0].select(range(len(first), len(tables[0])))
        notes.append(f"the first {scored} rows of {sources[0]} are scored on and not learned from")
    validation = draw(validation, data.max_validation, recipe.seed)
    steps = recipe.train.max_steps
    notes.append(
        f"data.streaming: rows are read as they are learned from, for {steps} steps, {data.shuffle_buffer:,} of them "
        "shuffled at a time: they are not counted beforehand, and equal rows are not kept apart; lengths are those of "
        "the start"
    )
    return Examples(train, validation, [], notes, forms[0], Stream(recipe, readers, skips))


def rows_of(recipe: Recipe, source: str) -> Iterator[Row]:
    """The rows of a file or hub data set, one after the other. Raises DataError if it can't be streamed."""
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    if is_hub_name(source) or Path(hub_parts(source, None, "")[0]).expanduser().is_dir():
        first = source == recipe.data.train
        subset, split = (recipe.data.subset, recipe.data.train_split) if first else (None, "train")
        rows = load_hub(source, subset, split, streaming=True)
        try:
            yield from rows
        except (OSError, ValueError, RuntimeError, TypeError, DatasetsError) as error:
            raise DataError(f"{source} cannot be read further: {first_line(error)}") from error
        return
    if not path.is_file():
        raise DataError(f"data file {missing_path(source)}")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    reader = _READERS.get(suffix)
    if reader is None:
        raise DataError(f"data.streaming: {source} can't be read row by row; {', '.join(_READERS)} can")
    try:
        yield from reader(recipe, path)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise DataError(f"{source} cannot be read as {suffix[1:]}: {first_line(error)}") from error


def _lines(recipe: Recipe, path: Path, newline: str | None = "\n") -> Iterator[str]:
    how: dict[str, Any] = {"encoding": recipe.data.encoding or "utf-8-sig", "newline": newline}
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", **how) as file:
        yield from file


def _json(recipe: Recipe, path: Path) -> Iterator[Row]:
    for number, row in json_lines(path, _lines(recipe, path), "one object a line"):
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {with_article(type(row).__name__)}, each must be an object")
        yield row


def _text(recipe: Recipe, path: Path) -> Iterator[Row]:
    for line in _lines(recipe, path, None):
        if line.strip():
            yield {"text": line.rstrip("\n")}


def _table(recipe: Recipe, path: Path, tabs: bool) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    first = next(_lines(recipe, path), "")
    delimiter = "\t" if tabs else recipe.data.delimiter or first_delimiter(first)
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    table = csv.DictReader(_lines(recipe, path, ""), delimiter=delimiter, quoting=quoting)
    for number, row in enumerate(table, start=1):
        if None in row:  # DictReader's key for cells without a column
            raise DataError(f"{path}, row {number}: more cells than the {len(table.fieldnames or ())} columns")
        yield row


def _parquet(recipe: Recipe, path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Recipe, Path], Iterator[Row]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".txt": _text,
    ".csv": partial(_table, tabs=False),
    ".tsv": partial(_table, tabs=True),
    ".parquet": _parquet,
}
