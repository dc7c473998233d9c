"""From a recipe's `data.*` to the two parts of examples, checked, with the classes' names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.glue import PREFIX, glue_name
from ziggurat.recipe.schema import DataPart, Recipe

from .faults import Faults, kind_of
from .glue import glue_splits
from .labels import check_class_values, check_numbers, classes_of, names_of, number_of, places_of
from .readers import encoding_of
from .splits import FEW, ORIGIN, draw_split, joined, mixed
from .tables import draw, is_hub_name, is_one_table, read_table, require_column

if TYPE_CHECKING:
    from datasets import Dataset

    from .streams import Stream


@dataclass(frozen=True)
class Examples:
    """Checked examples. Scored tasks: columns `text`, `text_pair` (if two) and `label`; instruct: see `to_rows`.

    `shape` is the shape of instruction data; `stream`: the training rows, if they are streamed and `train` holds those
    at their start. `notes` describe automatic decisions.
    """

    train: Dataset
    validation: Dataset
    label_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shape: str | None = None
    stream: Stream | None = None

    @property
    def has_images(self) -> bool:
        """True if a row has an image."""
        return any(any(part["images"]) for part in (self.train, self.validation) if "images" in part.column_names)


def load_examples(recipe: Recipe) -> Examples:
    """Read, split and check the data of a recipe.

    Raises DataError: nothing to read, a column that isn't there, empty texts, an empty split, a class of the validation
    data that the training data lack, a label that isn't a number (regression).
    """
    if recipe.data.streaming:
        from .streams import load_stream

        return load_stream(recipe)
    notes: list[str] = []
    data = recipe.data
    train, validation = _tables(recipe)
    sources = [data.train, *(data.more or [])]
    trains = [train, *(_read(recipe, source, "train", first=False) for source in sources[1:])]
    names: list[str] = []
    shape = None
    # All rows are checked before a part is split off, so that errors name rows of the file.
    if (read := _reader(recipe)) is not None:
        parts = (read(recipe, table, source) for table, source in zip(trains, sources, strict=True))
        tables, shapes, remarks = zip(*parts, strict=True)
        shape = shapes[0]
        if len(set(shapes)) > 1:
            forms = ", ".join(f"{source} ({form})" for source, form in zip(sources, shapes, strict=True))
            raise DataError(f"data.train: the files have several forms: {forms}; data.as_chat makes chats of pairs")
        notes += [note for of_file in remarks for note in of_file]
        train = joined(tables, sources)
        if validation is not None:
            validation, _, remarks = read(recipe, validation, data.validation or data.train)
            notes += remarks
    elif recipe.task == "tokens":
        from .tags import load_tagged

        train, validation, names = load_tagged(recipe, trains, validation, notes)
    else:
        train, validation, names = _labelled(recipe, trains, validation, notes)
    if validation is None:
        train, validation = _split_off(recipe, train, notes)
        if ORIGIN in validation.column_names:
            validation = validation.remove_columns(ORIGIN)
    train, limits = mixed(recipe, train, notes), (data.max_train, data.max_validation)
    for part, limit, word in zip((train, validation), limits, ("learns from", "scores on"), strict=True):
        if limit is not None and limit < len(part):
            notes.append(f"{word} {limit} of {len(part)} rows, drawn with seed {recipe.seed}")
    train, validation = (draw(*part, recipe.seed) for part in zip((train, validation), limits, strict=True))
    if recipe.task in ("classification", "multilabel") and len(set(map(str, train["label"]))) < 2:
        raise DataError(f"data.label: all {len(train)} training rows have the same label, nothing to learn")
    return Examples(train, validation, names, notes, shape)


def load_scored(recipe: Recipe, source: str, names: list[str]) -> tuple[Dataset, str | None, list[str]]:
    """The checked rows of a file that is to be scored, the shape of instruction data, and notes.

    `names`: the classes that the model knows. Raises DataError as `load_examples` does, and for classes beside these.
    """
    data = recipe.data.model_copy(update={"encoding": encoding_of(source, recipe.data.encoding)})
    table = _read(recipe.model_copy(update={"data": data}), source, "train")
    if (read := _reader(recipe)) is not None:
        return read(recipe, table, source)
    notes: list[str] = []
    if recipe.task == "tokens":
        from .tags import tagged_among

        return tagged_among(recipe, table, names, source, notes), None, notes
    table = _checked(recipe, table, source, notes)
    values = list(table[recipe.data.label])
    if recipe.task == "regression":
        labels: list[Any] = [number_of(value) for value in values]
    elif recipe.task == "multilabel":
        from .multi import sets_among

        labels = sets_among(recipe, table, names, source)
    else:
        labels = places_of(recipe, values, names, source)
    return _assemble(recipe, table, labels), None, notes


def class_names(recipe: Recipe) -> list[str] | None:
    """The classes of a classification recipe, from the training rows alone; None if they are on the hub.

    Raises DataError as `load_examples` does.
    """
    data = recipe.data
    if data.label_names is not None:
        return list(data.label_names)
    if is_hub_name(data.train):
        return None
    if data.more:
        return load_examples(recipe).label_names
    train = _read(recipe, data.train, data.train_split)
    if recipe.task == "tokens":
        from .tags import tag_names

        return tag_names(recipe, train, None, data.train)
    require_column(train, data.label, "data.label", data.train)
    faults = Faults(data.train, len(train))
    _check_labels(recipe, list(train[data.label]), faults)
    train, _ = faults.settle(train, data.drop_missing)
    if recipe.task == "multilabel":
        from .multi import one_a_row

        train, _ = one_a_row(recipe, train)
    return names_of(recipe, train, data.train)


def _tables(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """The training table and the validation table; None if a part of the first has to be split off."""
    data = recipe.data
    _check_splits(data)
    train, validation = glue_splits(data) or (None, None)
    if validation is not None:
        assert train is not None
        return train, validation
    if train is None:
        train = _read(recipe, data.train, data.train_split)
    if data.validation is not None:
        split = data.validation_split or ("validation" if is_hub_name(data.validation) else "train")
        return train, _read(recipe, data.validation, split, demo="validation")
    if data.validation_split is not None and not data.train.startswith(PREFIX):
        return train, _read(recipe, data.train, data.validation_split)
    return train, None


def _read(recipe: Recipe, source: str, split: str, demo: str = "train", first: bool = True) -> Dataset:
    return read_table(
        source,
        subset=recipe.data.subset if first else None,
        split=split,
        demo=demo,
        texts=[*text_columns(recipe), *([recipe.data.label] if recipe.task == "multilabel" else [])],
        nested=text_columns(recipe) if recipe.kind.rows in _READ_APART else (),
        classes=recipe.data.label if recipe.task == "classification" else None,
        encoding=recipe.data.encoding,
        delimiter=recipe.data.delimiter,
    )


def _split_off(recipe: Recipe, train: Dataset, notes: list[str]) -> tuple[Dataset, Dataset]:
    """A part of the training rows for the scores, drawn with the seed. Raises DataError if none is left to learn."""
    data = recipe.data
    count = data.validation_rows or max(1, round(len(train) * data.validation_share))
    if count >= len(train):
        raise DataError(
            f"{data.train} has {len(train)} rows: splitting off {count} for the scores leaves none to learn from; "
            "lower data.validation_rows or name validation data"
        )
    classes = {"classification": "label", "multilabel": "label", "kto": "good"}.get(recipe.task)
    strata = list(train[classes]) if classes is not None else None
    if recipe.task == "multilabel":
        from .multi import rarest

        strata = rarest(train["label"])
    split = draw_split(list(map(_identity, train)), strata, count, recipe.seed)
    scored = len(split.validation)
    notes.append(f"no validation data named: {scored} of {len(train)} rows split off with seed {recipe.seed}")
    if split.repeated:
        where = "; equal rows stay on one side of the split" if split.apart else ", on both sides of the split"
        notes.append(f"{split.repeated} of {len(train)} rows repeat an earlier one{where}")
    if scored < FEW:
        coarse = f", where one row more is {100 / scored:.0f} points" if recipe.task == "classification" else ""
        notes.append(f"only {scored} rows are scored{coarse}: differences may be chance; name validation data")
    return train.select(split.train), train.select(split.validation)


#: Form of rows -> module of this package and its function that reads them.
_READ_APART = {
    "answers": ("instruct", "to_rows"),
    "sources": ("sources", "to_sources"),
    "pairs": ("prefer", "to_pairs"),
    "judged": ("prefer", "to_judged"),
    "prompts": ("prompts", "to_prompts"),
}


def _reader(recipe: Recipe) -> Any:
    """The function that reads the rows of a task without labels or tags; else None."""
    if recipe.kind.rows not in _READ_APART:
        return None
    file, name = _READ_APART[recipe.kind.rows]
    return getattr(import_module(f".{file}", __package__), name)


def _identity(row: Any) -> str:
    """A key that must not occur on both sides of a split: a row without its label; the prompt of pairs; the source of a
    source with target.
    """
    if "messages_rejected" in row:
        return repr(json.loads(row["messages"])[: row["learned"]])
    if "prompt_rejected" in row or ("prompt" in row and "completion" not in row):
        return str(row["prompt"])
    if "source" in row:
        return str(row["source"])
    return repr([value for name, value in row.items() if name not in ("label", "good", "row", ORIGIN)])


def text_columns(recipe: Recipe) -> list[str]:
    """The columns that hold texts."""
    if recipe.kind.rows in _READ_APART:
        from .instruct import ALIASES, columns_of

        return columns_of(recipe, ALIASES)
    if recipe.task == "tokens":
        from .tags import tag_columns

        return list(tag_columns(recipe))
    return [column for column in (recipe.data.text, recipe.data.text_pair) if column is not None]


def _check_splits(data: DataPart) -> None:
    """Raises DataError for keys that choose a part of a data set, which files don't have."""
    scored = data.validation or data.train
    if data.train_split != "train" and is_one_table(data.train):
        raise DataError(f"data.train_split: '{data.train}' is a file and has no splits; drop the key")
    if data.validation_split is not None and is_one_table(scored):
        second = "" if data.validation else "name a second file in data.validation, or "
        split_off = "" if data.validation else " to have a part split off"
        raise DataError(
            f"data.validation_split: '{scored}' is a file and has no splits; {second}drop the key{split_off}"
        )
    if data.subset is not None and is_one_table(data.train) and is_one_table(scored):
        raise DataError(f"data.subset: '{data.train}' is a file and has no configurations; drop the key")


def _labelled(
    recipe: Recipe, trains: list[Dataset], validation: Dataset | None, notes: list[str]
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Checked columns `text`, `text_pair` and `label` of both tables, and the names of the classes."""
    data = recipe.data
    files = [data.train, *(data.more or [])]
    parts = [_checked(recipe, table, source, notes) for table, source in zip(trains, files, strict=True)]
    if len(files) > 1:
        used = [column for column in (data.text, data.text_pair, data.label) if column is not None]
        if len({str(table.features[data.label]) for table in parts}) > 1:
            parts = [_with_names(table, data.label) for table in parts]
        parts = [table.select_columns(used) for table in parts]
    tables = [joined(parts, files)]
    if validation is not None:
        tables.append(_checked(recipe, validation, data.validation or data.train, notes))
    if recipe.task == "regression":
        labels: list[list[Any]] = [[number_of(value) for value in table[data.label]] for table in tables]
        names: list[str] = []
    elif recipe.task == "multilabel":
        from .multi import sets_of

        names, labels = sets_of(recipe, tables, data.train)
    else:
        names, labels = classes_of(recipe, tables, data.train)
    built = [_assemble(recipe, table, label) for table, label in zip(tables, labels, strict=True)]
    return built[0], built[1] if validation is not None else None, names


def _with_names(table: Dataset, column: str) -> Dataset:
    """A table with class names in the place of a hub data set's numbers, as in other files."""
    names = getattr(table.features[column], "names", None)
    if names is None:
        return table
    values = [None if value is None else names[value] for value in table[column]]
    return table.remove_columns(column).add_column(column, values)


def _checked(recipe: Recipe, table: Dataset, source: str, notes: list[str]) -> Dataset:
    """The usable rows of a table; `notes` gets how many are left out. Raises DataError that counts all others."""
    data = recipe.data
    texts = [("data.text", data.text)]
    if data.text_pair is not None:
        texts.append(("data.text_pair", data.text_pair))
    for key, column in [*texts, ("data.label", data.label)]:
        require_column(table, column, key, source)
    faults = Faults(source, len(table))
    # GLUE is scored as it was published, and a few questions of QQP are empty.
    for key, column in texts if glue_name(data.train, data.subset) is None else ():
        for index, text in enumerate(list(table[column])):
            if text is None or not str(text).strip():
                faults.add(index, f"no text in column '{column}' ({key})", gap=True)
            elif isinstance(text, list | dict | bytes):
                faults.add(index, f"column '{column}' ({key}): a text is needed, this is {kind_of(text)}")
    _check_labels(recipe, list(table[data.label]), faults)
    table, left_out = faults.settle(table, data.drop_missing)
    notes += left_out
    return table


def _check_labels(recipe: Recipe, values: list[Any], faults: Faults) -> None:
    if recipe.task == "multilabel":
        from .multi import check_sets

        return check_sets(recipe, values, faults)
    check = check_numbers if recipe.task == "regression" else check_class_values
    check(values, recipe.data.label, faults)


def _assemble(recipe: Recipe, table: Dataset, labels: list[Any]) -> Dataset:
    from datasets import Dataset

    columns = {"text": _texts(table[recipe.data.text]), "label": labels}
    if recipe.data.text_pair is not None:
        columns["text_pair"] = _texts(table[recipe.data.text_pair])
    if ORIGIN in table.column_names:
        columns[ORIGIN] = list(table[ORIGIN])
    return Dataset.from_dict(columns)


def _texts(values: Any) -> list[str]:
    """Texts; empty ones for missing texts of GLUE, which aren't checked."""
    return ["" if value is None else str(value) for value in values]
