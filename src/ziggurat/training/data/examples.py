"""From a recipe's `data.*` to the two parts of examples, checked, with the classes' names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.glue import PREFIX
from ziggurat.recipe.schema import DataPart, Recipe

from .glue import glue_splits
from .readers import encoding_of
from .splits import FEW, ORIGIN, draw_split, joined, mixed
from .tables import draw, is_hub_name, is_one_table, read_table

if TYPE_CHECKING:
    from datasets import Dataset

    from .streams import Stream


@dataclass(frozen=True)
class Examples:
    """Checked examples. Scored tasks: columns `text`, `text_pair` (if two) and `label`; instruct: see `to_rows`.

    `shape` is the shape of instruction data; `stream`: the training rows, if they are streamed; `train` then holds the
    first of them. `notes` describe automatic decisions.
    """

    train: Dataset
    validation: Dataset
    label_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shape: str | None = None
    stream: Stream | None = None

    @property
    def parts(self) -> tuple[tuple[Dataset, str], tuple[Dataset, str]]:
        """Both parts, each with the word for its rows."""
        return (self.train, "training"), (self.validation, "validation")

    @property
    def has_images(self) -> bool:
        """True if a row has an image."""
        return any(any(table["images"]) for table, _ in self.parts if "images" in table.column_names)


def load_examples(recipe: Recipe) -> Examples:
    """Read, split and check the data of a recipe.

    Raises DataError: nothing to read, a missing column, empty texts, an empty split, a class of the validation
    data that the training data lack, a label that isn't a number (regression).
    """
    if recipe.data.streaming:
        from .streams import load_stream

        return load_stream(recipe)
    notes: list[str] = []
    data, sources = recipe.data, recipe.data.sources
    train, validation = _tables(recipe)
    trains = [train, *(_read(recipe, source, "train", first=False) for source in sources[1:])]
    names, shape = [], None
    # All rows are checked before a part is split off, so that errors name rows of the file.
    if recipe.kind.rows in _CLASSIFIED:
        train, validation, names = _module(recipe).load(recipe, trains, validation, notes)
    else:
        parts = [_rows(recipe, table, source, notes) for table, source in zip(trains, sources, strict=True)]
        shape = parts[0][1]
        if len({form for _, form in parts}) > 1:
            forms = ", ".join(f"{source} ({form})" for source, (_, form) in zip(sources, parts, strict=True))
            raise DataError(f"data.train: the files have several forms: {forms}; data.as_chat makes chats of pairs")
        train = joined([rows for rows, _ in parts], sources)
        if validation is not None:
            validation, _ = _rows(recipe, validation, data.scored, notes)
    named = validation is not None
    if validation is None:
        train, validation = _split_off(recipe, train, notes)
    train = _drawn(recipe, mixed(recipe, train, notes), data.max_train, "learns from", notes)
    validation = _drawn(recipe, validation, data.max_validation, "scores on", notes)
    if named and (known := _known(train, validation)):
        notes.append(
            f"{known} of {len(validation)} validation rows are training rows, too: their scores say nothing about "
            "rows that are new to the model"
        )
    if recipe.task in ("classification", "multilabel") and len(set(map(str, train["label"]))) < 2:
        raise DataError(f"data.label: all {len(train)} training rows have the same label, nothing to learn")
    return Examples(train, validation, names, notes, shape)


def load_scored(recipe: Recipe, source: str, names: list[str]) -> tuple[Dataset, str | None, list[str]]:
    """The checked rows of a file to be scored, the shape of instruction data, and notes.

    `names`: the classes that the model knows. Raises DataError as `load_examples` does, and for other classes.
    """
    if not recipe.data.drop_missing:  # no row can be left out, as the recipe is that of a finished run
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"drop_missing": None})})
    table, notes = _read(recipe, source, "train", scored=True), list[str]()
    if recipe.kind.rows in _CLASSIFIED:
        return _module(recipe).among(recipe, table, names, source, notes), None, notes
    return *_rows(recipe, table, source, notes), notes


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
    return _module(recipe).class_names(recipe, _read(recipe, data.train, data.train_split), data.train)


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


def _read(
    recipe: Recipe, source: str, split: str, demo: str = "train", *, first: bool = True, scored: bool = False
) -> Dataset:
    """The rows of a source; `first`: `data.subset` applies to it; `scored`: it may have another encoding."""
    return read_table(
        source,
        subset=recipe.data.subset if first else None,
        split=split,
        demo=demo,
        texts=[*text_columns(recipe), *([recipe.data.label] if recipe.task == "multilabel" else [])],
        nested=text_columns(recipe) if recipe.kind.rows not in _CLASSIFIED else (),
        classes=recipe.data.label if recipe.task == "classification" else None,
        encoding=encoding_of(source, recipe.data.encoding) if scored else recipe.data.encoding,
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
        from .labels import rarest

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
    return train.select(split.train), train.select(split.validation).select_columns(
        [name for name in train.column_names if name != ORIGIN]
    )


def _drawn(recipe: Recipe, rows: Dataset, limit: int | None, word: str, notes: list[str]) -> Dataset:
    """The rows, or as many as `limit` allows, drawn with the seed."""
    if limit is not None and limit < len(rows):
        notes.append(f"{word} {limit} of {len(rows)} rows, drawn with seed {recipe.seed}")
    return draw(rows, limit, recipe.seed)


#: Forms of rows with classes: their modules have `load`, `among`, `class_names` and `text_columns`.
_CLASSIFIED = {"labelled": "labelled", "tagged": "tags"}
#: Form of other rows -> module and its function that reads them.
_READ_APART = {
    "answers": ("instruct", "to_rows"),
    "sources": ("sources", "to_sources"),
    "pairs": ("prefer", "to_pairs"),
    "judged": ("prefer", "to_judged"),
    "prompts": ("prompts", "to_prompts"),
}


def _module(recipe: Recipe) -> Any:
    return import_module(f".{_CLASSIFIED[recipe.kind.rows]}", __package__)


def _rows(recipe: Recipe, table: Dataset, source: str, notes: list[str]) -> tuple[Dataset, str]:
    """The rows of a task without classes, and their shape."""
    file, name = _READ_APART[recipe.kind.rows]
    rows, shape, remarks = getattr(import_module(f".{file}", __package__), name)(recipe, table, source)
    notes += remarks
    return rows, shape


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


def _known(train: Dataset, validation: Dataset) -> int:
    """How many validation rows have an equal training row."""
    scored = list(_identities(validation))
    different = set(scored)
    learned = {identity for identity in _identities(train) if identity in different}
    return sum(identity in learned for identity in scored)


def _identities(rows: Dataset) -> Iterator[str]:
    """`_identity` of each row, column by column where it consists of whole columns, which takes a tenth of the time."""
    names = rows.column_names
    if "messages_rejected" in names:
        return map(_identity, rows)
    alone = next((name for name in ("prompt", "source") if name in names), None)
    pairs = alone == "prompt" and "completion" in names and "prompt_rejected" not in names
    if alone is not None and not pairs:
        return map(str, rows[alone])
    used = [name for name in names if name not in ("label", "good", "row", ORIGIN)]
    return (repr(list(values)) for values in zip(*(rows[name] for name in used), strict=True))


def text_columns(recipe: Recipe) -> list[str]:
    """The columns that hold texts."""
    if recipe.kind.rows in _CLASSIFIED:
        return _module(recipe).text_columns(recipe)
    from .instruct import ALIASES, columns_of

    return columns_of(recipe, ALIASES)


def _check_splits(data: DataPart) -> None:
    """Raises DataError for keys that choose a part of a data set, which files don't have."""
    if data.train_split != "train" and is_one_table(data.train):
        raise DataError(f"data.train_split: '{data.train}' is a file and has no splits; drop the key")
    if data.validation_split is not None and is_one_table(data.scored):
        second = "" if data.validation else "name a second file in data.validation, or "
        split_off = "" if data.validation else " to have a part split off"
        raise DataError(
            f"data.validation_split: '{data.scored}' is a file and has no splits; {second}drop the key{split_off}"
        )
    if data.subset is not None and is_one_table(data.train) and is_one_table(data.scored):
        raise DataError(f"data.subset: '{data.train}' is a file and has no configurations; drop the key")
