"""From a recipe's `data.*` to the two splits of examples, checked, with the classes' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.glue import PREFIX, glue_name
from ziggurat.recipe.schema import DataPart, Recipe

from .glue import glue_splits
from .tables import draw, is_hub_name, is_one_table, read_table, require_column

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Examples:
    """Checked examples. Scored tasks: columns `text`, `text_pair` (if two) and `label`; instruct: prompt, completion.

    `shape` is the shape that instruction data had. `notes` says in plain words what was decided on the user's behalf.
    """

    train: Dataset
    validation: Dataset
    label_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shape: str | None = None


def load_examples(recipe: Recipe) -> Examples:
    """Read, split and check the data of a recipe.

    Raises DataError: nothing to read, a column that isn't there, empty texts, an empty split, a class of the validation
    data that the training data lack, a label that isn't a number (regression).
    """
    notes: list[str] = []
    train, validation = _tables(recipe)
    names: list[str] = []
    shape = None
    # All is checked before a part is split off, so that errors name rows of the file.
    if recipe.task == "instruct":
        from .instruct import shape_of, to_prompts

        shape = shape_of(recipe, train, recipe.data.train)
        train, lost = to_prompts(recipe, train, recipe.data.train)
        notes += lost
        if validation is not None:
            validation, lost = to_prompts(recipe, validation, recipe.data.validation or recipe.data.train)
            notes += lost
        if isinstance(train[0]["prompt"], list):
            shape = "messages"
    else:
        train, validation, names = _labelled(recipe, train, validation)
    if validation is None:
        train, validation = _split_off(recipe, train, names, notes)
    if recipe.task == "instruct":
        from .instruct import with_answers

        train, less = with_answers(train, recipe.data.train)
        validation, fewer = with_answers(validation, recipe.data.validation or recipe.data.train)
        notes += [note for note in (less, fewer) if note is not None]
    data = recipe.data
    for part, limit, word in (
        (train, data.max_train, "learns from"),
        (validation, data.max_validation, "scores on"),
    ):
        if limit is not None and limit < len(part):
            notes.append(f"{word} {limit} of {len(part)} rows, drawn with seed {recipe.seed}")
    train, validation = (
        draw(train, data.max_train, recipe.seed),
        draw(validation, data.max_validation, recipe.seed),
    )
    if recipe.task == "classification" and len(set(train["label"])) < 2:
        raise DataError(f"data.label: all {len(train)} training rows have the same label, nothing to learn")
    return Examples(train, validation, names, notes, shape)


def class_names(recipe: Recipe) -> list[str] | None:
    """The classes of a classification recipe, of the training rows alone; None where only a hub could tell.

    Raises DataError as `load_examples` does.
    """
    data = recipe.data
    if data.label_names is not None:
        return list(data.label_names)
    if is_hub_name(data.train):
        return None
    train = _read(recipe, data.train, data.train_split)
    require_column(train, data.label, "data.label", data.train)
    return _known(recipe, train, _class_values(train[data.label], data.label, data.train))[1]


def _tables(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """The training table and the validation table; None where a part of the first is to be split off."""
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


def _read(recipe: Recipe, source: str, split: str, demo: str = "train") -> Dataset:
    return read_table(
        source,
        subset=recipe.data.subset,
        split=split,
        demo=demo,
        texts=text_columns(recipe),
        classes=recipe.data.label if recipe.task == "classification" else None,
    )


def _split_off(recipe: Recipe, train: Dataset, names: list[str], notes: list[str]) -> tuple[Dataset, Dataset]:
    """A part of the training rows for the scores, drawn with the seed. Raises DataError if none is left to learn."""
    data = recipe.data
    count = data.validation_rows or max(1, round(len(train) * data.validation_share))
    if count >= len(train):
        raise DataError(
            f"{data.train} has {len(train)} rows: splitting off {count} for the scores leaves none to learn from; "
            "lower data.validation_rows or name validation data"
        )
    parts = train.train_test_split(test_size=count, seed=recipe.seed)
    notes.append(f"no validation data named: {count} of {len(train)} rows split off with seed {recipe.seed}")
    lost = set(parts["test"]["label"]) - set(parts["train"]["label"]) if recipe.task == "classification" else ()
    if lost:
        notes.append(
            f"all rows with the label {_some([names[label] for label in sorted(lost)])} were split off, so nothing is "
            "learned of them; name validation data, or choose another seed"
        )
    return parts["train"], parts["test"]


def text_columns(recipe: Recipe) -> list[str]:
    """The columns that hold texts."""
    if recipe.task == "instruct":
        from .instruct import TEXTS

        return list(TEXTS)
    return [column for column in (recipe.data.text, recipe.data.text_pair) if column is not None]


def _check_splits(data: DataPart) -> None:
    """Keys that say which part of a data set is meant have no meaning with files. Raises DataError."""
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


def _labelled(recipe: Recipe, train: Dataset, validation: Dataset | None) -> tuple[Dataset, Dataset | None, list[str]]:
    data = recipe.data
    sources = [(train, data.train)]
    if validation is not None:
        sources.append((validation, data.validation or data.train))
    columns = [("data.text", data.text), ("data.label", data.label)]
    if data.text_pair is not None:
        columns.insert(1, ("data.text_pair", data.text_pair))
    for table, source in sources:
        for key, column in columns:
            require_column(table, column, key, source)
        # GLUE is scored as it was published, and a few questions of QQP are empty.
        for key, column in columns[:-1] if glue_name(data.train, data.subset) is None else ():
            _check_texts(table[column], key, column, source)
    if recipe.task == "regression":
        labels = [_numbers(table[data.label], data.label, source) for table, source in sources]
        names: list[str] = []
    else:
        names, labels = _classes(recipe, sources)
    built = [_assemble(recipe, table, label) for (table, _), label in zip(sources, labels, strict=True)]
    return built[0], built[1] if validation is not None else None, names


def _assemble(recipe: Recipe, table: Dataset, labels: list[Any]) -> Dataset:
    from datasets import Dataset

    columns = {"text": _texts(table[recipe.data.text]), "label": labels}
    if recipe.data.text_pair is not None:
        columns["text_pair"] = _texts(table[recipe.data.text_pair])
    return Dataset.from_dict(columns)


def _texts(values: Any) -> list[str]:
    """Texts as they are; none where GLUE, whose texts aren't checked, has none."""
    return ["" if value is None else str(value) for value in values]


def _check_texts(texts: Any, key: str, column: str, source: str) -> None:
    empty = [index for index, text in enumerate(texts) if text is None or not str(text).strip()]
    if empty:
        raise DataError(
            f"{key}: {len(empty)} of {len(texts)} rows of {source} have no text in column '{column}', "
            f"the first is row {empty[0] + 1}; take them out"
        )
    odd = next((index for index, text in enumerate(texts) if isinstance(text, (list, dict, bytes))), None)
    if odd is not None:
        raise DataError(
            f"{key}: column '{column}' of {source}, row {odd + 1}: a text is needed, this is {_kind(texts[odd])}"
        )


def _kind(value: Any) -> str:
    return "bytes that are not UTF-8 throughout" if isinstance(value, bytes) else f"a {type(value).__name__}"


def _numbers(values: Any, column: str, source: str) -> list[float]:
    import math

    numbers = []
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"data.label: regression needs numbers, column '{column}' of {source} has {value!r} "
                f"in row {index + 1}; correct it, or set task: classification"
            )
        numbers.append(number)
    return numbers


def _classes(recipe: Recipe, sources: list[tuple[Dataset, str]]) -> tuple[list[str], list[list[int]]]:
    """Names of the classes, and each table's labels as indices into them; the first table is the training data."""
    column = recipe.data.label
    values = [_class_values(table[column], column, source) for table, source in sources]
    known, names = _known(recipe, sources[0][0], values[0])
    # By name too: one table may count the classes that the other spells out, or count them in an order of its own.
    place = {name: index for index, name in enumerate(names)} | {value: index for index, value in enumerate(known)}
    for (table, _), part in zip(sources[1:], values[1:], strict=True):
        own = getattr(table.features[column], "names", None)
        if own is not None and recipe.data.label_names is None:
            part[:] = [own[value] if value in range(len(own)) else value for value in part]
        # Numbers here may be texts there, where one label that is no number makes texts of all.
        part[:] = [value if value in place else str(value) for value in part]
        unseen = sorted({value for value in part if value not in place})
        if unseen:
            raise DataError(
                f"data.label: the validation data have {_some(unseen)} in column '{column}', which the training data "
                f"lack; known: {_some(names)}"
            )
    return names, [[place[value] for value in part] for part in values]


def _known(recipe: Recipe, train: Dataset, values: list[Any]) -> tuple[list[Any], list[str]]:
    """The classes as the labels call them, and their names.

    A hub data set's own class names and data.label_names count the classes 0, 1, ...; else the classes are the values
    found in the training data, in order.
    """
    column, source = recipe.data.label, recipe.data.train
    given = recipe.data.label_names or getattr(train.features[column], "names", None)
    seen = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if given is not None:
        texts = all(isinstance(value, str) for value in seen)
        known: list[Any] = list(given) if texts else list(range(len(given)))
        extra = [value for value in seen if value not in known]
        if extra:
            hint = " (a negative label marks rows without an answer)" if extra == [-1] else ""
            raise DataError(
                f"data.label: column '{column}' of {source} has {_some(extra)}, but data.label_names names "
                f"{len(given)} classes: {', '.join(given)}{hint}"
            )
        names = [str(name) for name in given]
    else:
        known = seen
        names = [str(value) for value in seen]
    if len(known) > 100 and len(known) > len(values) / 2:
        raise DataError(
            f"data.label: column '{column}' of {source} has {len(known)} different values in {len(values)} rows, "
            "which are no classes; name another column, or set task: regression"
        )
    return known, names


def _class_values(values: Any, column: str, source: str) -> list[Any]:
    found: list[Any] = []
    for index, value in enumerate(values):
        if value is None or value == "":
            raise DataError(f"data.label: column '{column}' of {source} has no label in row {index + 1}")
        if isinstance(value, float):
            if not value.is_integer():
                raise DataError(
                    f"data.label: column '{column}' of {source} has {value} in row {index + 1}, which is no class; "
                    "set task: regression, or name another column"
                )
            value = int(value)
        if isinstance(value, (list, dict, bytes)):
            kind = _kind(value)
            raise DataError(
                f"data.label: column '{column}' of {source}, row {index + 1}: one class is needed, this is {kind}"
            )
        found.append(value)
    kinds = {isinstance(value, str) for value in found}
    return [str(value) for value in found] if len(kinds) > 1 else found


def _some(values: list[Any]) -> str:
    shown = ", ".join(repr(value) if isinstance(value, str) else str(value) for value in values[:6])
    return shown + (f" and {len(values) - 6} more" if len(values) > 6 else "")
