"""A first recipe for a file: task, columns and length from its columns and rows, the rest from one file of defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ziggurat.errors import DataError, ZigguratError
from ziggurat.recipe.defaults import Proposal, keys_for, models_for
from ziggurat.recipe.recipe import recipe_of
from ziggurat.recipe.tasks import TASKS

if TYPE_CHECKING:
    from datasets import Dataset

#: Columns that hold labels, and pairs of columns that hold two texts, by their usual names.
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "score", "rating", "stars")
_PAIRS = (
    *(("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("text1", "text2")),
    *(("text_a", "text_b"), ("query", "passage"), ("first", "second")),
)
#: Pairs of columns that hold words and their tags, by their usual names.
_TAGGED = (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags"), ("words", "labels"), ("words", "ner"))
#: Pairs of columns that hold source and target texts, by their usual names.
_SEQUENCES = (
    *(("source", "target"), ("document", "summary"), ("article", "highlights"), ("article", "summary")),
    *(("dialogue", "summary"), ("text", "summary")),
)
#: More different values than this, in more than a tenth of the rows, are no classes but numbers.
_MOST_CLASSES = 30
#: Characters of a token, roughly, for a length before a model is known; lengths are multiples of `_STEP`.
_CHARACTERS, _STEP, _LONGEST = 4, 32, 512


@dataclass
class Start:
    """The task inferred from a file's columns and rows, each key with its value and reason, and whether there are
    images."""

    task: str
    why: str
    keys: dict[str, tuple[Any, str]] = field(default_factory=dict)
    images: bool = False


def start(file: str, *, task: str | None = None, model: str | None = None) -> tuple[str, Start]:
    """The text of a recipe for `file`, and the inferred `Start`. `task` and `model` override the inference.

    Raises DataError for a file that can't be read, or whose columns fit no task.
    """
    inferred = look(file, task)
    proposals = models_for(inferred.task, inferred.images)
    name = model or _first_here(proposals)
    text = _text(file, inferred, name, proposals, "")
    return _text(file, inferred, name, proposals, _size(text, name, proposals)), inferred


def look(file: str, task: str | None = None) -> Start:
    """Infer the task from the columns and rows of `file`. Raises DataError."""
    from ziggurat.training.data.instruct import ALIASES
    from ziggurat.training.data.readers import has_head_line
    from ziggurat.training.data.tables import read_table

    nested = [name for names in ALIASES.values() for name in names]
    encoding = _encoding_of(file)
    table = read_table(file, nested=nested, encoding=encoding)
    inferred = next((form for form in _forms(table) if task in (None, form.task)), None)
    if inferred is None and (task is None or TASKS[task].rows in ("labelled", "answers")):
        inferred = _table(table, task, has_head_line(file))
    if inferred is None or task not in (None, inferred.task):
        raise DataError(
            f"{file} has the columns {', '.join(table.column_names)}, which fit {task or 'no task'}; needed: a text "
            "and a label, a list of labels, or a number (classification, multilabel, regression); tokens and tags "
            "(tokens); messages, prompt and completion, instruction and output, or text alone (instruct); source and "
            "target (seq2seq); prompt, chosen and rejected (dpo); prompt, completion and a label true or false (kto). "
            "Rename columns, or choose a task by --task"
        )
    if encoding is not None:
        cells = (str(value) for row in table.to_list() for value in row.values())
        example = next((text[:40] for text in cells if not text.isascii()), "")
        why = f"it is not UTF-8; check whether this is right: {example}"
        inferred.keys = {"data.encoding": (encoding, why), **inferred.keys}
    return inferred


def _encoding_of(file: str) -> str | None:
    """The encoding to try where a file of text isn't UTF-8: that of Western Windows, whose tables are the commonest."""
    from ziggurat.training.data.readers import PACKED, encoding_of

    is_text = Path(file).expanduser().is_file() and not file.lower().endswith(PACKED)
    return encoding_of(file, "cp1252") if is_text else None


def _forms(table: Dataset) -> Iterator[Start]:
    """The tasks that the names of the columns determine."""
    from ziggurat.training.data.chat import has_images
    from ziggurat.training.data.instruct import ALIASES

    def has(*names: str) -> bool:
        return all(any(column in table.column_names for column in ALIASES[name]) for name in names)

    tagged = next((pair for pair in _TAGGED if all(name in table.column_names for name in pair)), None)
    if tagged is not None:
        named = zip(("tokens", "tags"), tagged, strict=True)
        keys: dict[str, tuple[Any, str]] = {f"data.columns.{key}": (name, "") for key, name in named if key != name}
        yield Start("tokens", "words with tags, of which B- begins an entity and I- goes on with it", keys)
    rewritten = next((pair for pair in _SEQUENCES if all(name in table.column_names for name in pair)), None)
    if rewritten is not None:
        yield Start("seq2seq", f"texts in {rewritten[0]} that become those in {rewritten[1]}")
    if has("chosen", "rejected"):
        yield from (Start(task, "pairs of a chosen and a rejected answer") for task in ("dpo", "orpo", "reward"))
    verdict = {str(value).lower() for value in table["label"]} if "label" in table.column_names else set()
    if has("prompt", "completion") and verdict and verdict <= {"true", "false", "0", "1"}:
        yield Start("kto", "answers that a label calls good or bad", {"data.label": ("label", "true or false")})
    for shape, names in (
        ("messages", ("messages",)),
        ("alpaca", ("instruction", "output")),
        ("prompt", ("prompt", "completion")),
    ):
        if has(*names):
            keys = {"data.format": (shape, f"columns {' and '.join(names)}")}
            if shape != "messages":
                keys["data.as_chat"] = (True, "joined by the model's chat template; false for a base model")
            column = next((name for name in ALIASES["messages"] if name in table.column_names), None)
            images = has("images") or any(has_images(cell) for cell in (table[column] if column else ()))
            subject = "questions with answers" if shape != "messages" else "conversations"
            yield Start("instruct", subject + " about images" * images, keys, images)


def _table(table: Dataset, task: str | None, named_by_row: bool) -> Start | None:
    """A table with texts and labels, or with texts alone; None if it has no text. `named_by_row`: its first row, in the
    file, names its columns."""
    # Lists and objects are neither texts nor labels of these tasks.
    kinds = (str, int, float, bool, type(None))
    columns = {name: list(table[name]) for name in table.column_names}
    lists = [name for name in columns if name.casefold() in _LABELS and all(isinstance(v, list) for v in columns[name])]
    columns = {name: values for name, values in columns.items() if all(isinstance(value, kinds) for value in values)}
    if lists and task in (None, "multilabel"):
        return _several(columns, lists[0], list(table[lists[0]]))
    label = _label_of(columns)
    texts = [name for name, values in columns.items() if name != label and _is_text(values)]
    texts.sort(key=lambda name: -sum(len(str(value)) for value in columns[name]))
    pair = next((pair for pair in _PAIRS if all(name in texts for name in pair)), None)
    first = pair[0] if pair else texts[0] if texts else None
    if first is None:
        return None
    if label is None or task == "instruct":
        keys: dict[str, tuple[Any, str]] = {"data.format": ("text", "plain text, learned whole")}
        if first != "text":
            keys["data.columns.text"] = (first, "")
        return Start("instruct", "texts without labels: training goes on with plain text", keys)
    values = [value for value in columns[label] if not _is_gap(value) and value == value]  # NaN is no label
    if not values or (task == "regression" and not all(isinstance(value, int | float) for value in values)):
        return None
    kind = task or ("regression" if _are_numbers(values) else "classification")
    others = [name for name in texts if name not in (pair or (first,))]
    keys = {"data.text": (first, f"other texts: {', '.join(others)}" if others else "the column of texts")}
    if pair:
        keys["data.text_pair"] = (pair[1], "two texts are compared")
    headless = "; it is called as one of them: if the file has no head line, its first row is lost"
    is_headless = named_by_row and label in set(map(str, values))
    keys["data.label"] = (label, _labels_in_words(values, kind) + headless * is_headless)
    spellings = Counter(" ".join(str(value).split()).casefold() for value in set(values))
    if kind == "classification" and any(count > 1 for count in spellings.values()):
        keys["data.similar_labels"] = (
            "merge",
            "some labels differ by case or blanks alone; keep makes a class of each",
        )
    read = (first, label, *pair[1:]) if pair else (first, label)
    gaps = sum(any(_is_gap(columns[name][row]) for name in read) for row in range(len(table)))
    if gaps:
        keys["data.drop_missing"] = (True, f"{gaps} of {len(table)} rows lack a text or a label")
    keys["data.max_length"] = _length(columns[first], columns[pair[1]] if pair else [])
    return Start(kind, f"texts with {'numbers' if kind == 'regression' else 'classes'}", keys)


def _several(columns: dict[str, list[Any]], label: str, sets: Sequence[Sequence[Any]]) -> Start | None:
    """Texts with lists of labels; None where there is no text."""
    texts = [name for name, values in columns.items() if _is_text(values)]
    if not texts:
        return None
    text = max(texts, key=lambda name: sum(len(str(value)) for value in columns[name]))
    keys: dict[str, tuple[Any, str]] = {
        "data.text": (text, "the column of texts"),
        "data.label": (label, _labels_in_words([name for labels in sets for name in labels], "multilabel")),
        "data.max_length": _length(columns[text], []),
    }
    return Start("multilabel", "texts with several classes each", keys)


def _label_of(columns: dict[str, list[Any]]) -> str | None:
    """The column of labels: by its name, or the one that repeats few short values."""
    named = [name for name in columns if name.casefold() in _LABELS]
    if named:
        return min(named, key=lambda name: _LABELS.index(name.casefold()))
    few = {
        name: len(set(values))
        for name, values in columns.items()
        if 1 < len(set(map(str, values))) <= max(2, min(_MOST_CLASSES, len(values) // 3))
        and all(len(str(value)) < 40 for value in values)
    }
    return min(few, key=lambda name: few[name], default=None)


def _is_gap(value: Any) -> bool:
    """True where `data.drop_missing` leaves the row out."""
    return value is None or (isinstance(value, str) and not value.strip())


def _is_text(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values) and all(isinstance(v, str | None) for v in values)


def _are_numbers(values: Sequence[Any]) -> bool:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return False
    different = len(set(values))
    return any(value % 1 != 0 for value in values) or different > max(_MOST_CLASSES, len(values) / 10)


def _labels_in_words(values: Sequence[Any], kind: str) -> str:
    if kind == "regression":
        return f"{min(values)} to {max(values)}"
    counts = Counter(map(str, values)).most_common()
    shown = ", ".join(f"{name} {count}" for name, count in counts[:6])
    return f"{len(counts)} classes: {shown}" + (", ..." if len(counts) > 6 else "")


def _length(first: Sequence[Any], second: Sequence[Any]) -> tuple[int, str]:
    from ziggurat.training.data.encode import percentile

    seconds = second or [""] * len(first)
    lengths = [len(str(a)) + len(str(b)) for a, b in zip(first, seconds, strict=True)]
    tokens = percentile(lengths, 95) // _CHARACTERS + 2
    length = min(_LONGEST, -(-tokens // _STEP) * _STEP)
    return length, f"tokens: 95% of the rows have at most about {tokens}; the run says how many are cut"


def _first_here(proposals: Sequence[Proposal]) -> str:
    """The first model; the embedded one only where its package is installed."""
    from ziggurat.extras import missing
    from ziggurat.recipe.embedded import EMBEDDED, PACKAGE

    return next(each.name for each in proposals if each.name != EMBEDDED or not missing([PACKAGE]))


def _size(text: str, model: str, proposals: Sequence[Proposal]) -> str:
    """The model's size and trainable parameters, by `ziggurat plan`; or as listed, if its config isn't local."""
    from .of_recipe import plan_recipe

    try:
        plan = plan_recipe(model, recipe_of(text, label="recipe"), measure_memory=False)
    except (ZigguratError, ImportError, OSError, ValueError):
        listed = next((each for each in proposals if each.name == model), None)
        return f"{listed.millions:g}M parameters; {listed.about}" if listed else "your choice"
    return f"{plan.base / 1e6:.1f}M parameters; {plan.adapter:,} train, in {plan.file / 1024:,.0f} KiB (ziggurat plan)"


def _text(file: str, inferred: Start, model: str, proposals: Sequence[Proposal], size: str) -> str:
    """The recipe, each line followed by its reason."""
    lines = [
        f"# Written by `ziggurat init {_one_line(Path(file).name)}`: {inferred.why}. Change any value;",
        "# `ziggurat recipes --keys` explains every key, `ziggurat plan MODEL RECIPE` estimates the cost.",
        _line("task", inferred.task, inferred.why),
        _line("model", model, size),
        *(f"# model: {each.name}  # {each.millions:g}M; {each.about}" for each in proposals if each.name != model),
        _line("data.train", file, "a part of it is split off for the scores; data.validation names another file"),
    ]
    lines += [
        _line(key, value, why)
        for key, (value, why) in {**inferred.keys, **keys_for(inferred.task, inferred.images)}.items()
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, why: str) -> str:
    written = yaml.safe_dump({key: value}, default_flow_style=False, allow_unicode=True, width=10_000).strip()
    if isinstance(value, float) and "e" in repr(value):
        written = f"{key}: {value:.1e}"
    return f"{written:<40}  # {_one_line(why)}" if why else written


def _one_line(text: str) -> str:
    """A text as a comment: no line break and no control character ends it."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
