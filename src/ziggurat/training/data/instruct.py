"""Instruction data in any of the usual shapes, as texts, conversations or plain text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .alpaca import alpaca_prompt, with_context
from .chat import IMAGE, Message, as_messages, as_text, conversation, has_images, parsed, tools_of, with_system
from .faults import Faults, RowFault
from .images import Images, undecoded
from .tables import require_column

if TYPE_CHECKING:
    from datasets import Dataset

dumps = partial(json.dumps, ensure_ascii=False)

#: Key of `data.columns` -> the usual names of its column.
ALIASES = {
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools",),
    "system": ("system",),
    "history": ("history",),
    "prompt": ("prompt", "question", "query"),
    "completion": ("completion", "answer", "response"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "text": ("text",),
    "source": ("source", "document", "article", "dialogue", "text", "input"),
    "target": ("target", "summary", "highlights", "output"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "images": ("images", "image"),
}
#: Shape -> its required columns, and its optional ones.
_SHAPES = {
    "prompt": (("prompt", "completion"), ("tools", "system", "history", "images")),
    "alpaca": (("instruction", "output"), ("input", "system", "history", "images")),
    "messages": (("messages",), ("tools", "system", "images")),
    "text": (("text",), ()),
}
#: Columns of a better and a worse answer: preference data, not instruction data.
_PREFERRED = ("chosen", "rejected")


def column_of(recipe: Recipe, name: str, table: Dataset, source: str) -> str | None:
    """The column of `name`, by `data.columns` or by its usual names. Raises DataError if a named column is missing."""
    chosen = getattr(recipe.data.columns, name)
    if chosen is not None:
        require_column(table, chosen, f"data.columns.{name}", source)
        return chosen
    return next((column for column in ALIASES[name] if column in table.column_names), None)


def columns_of(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Every column that may stand for one of `names`."""
    columns: dict[str, None] = {}
    for name in names:
        chosen = getattr(recipe.data.columns, name)
        columns |= dict.fromkeys([chosen] if chosen is not None else ALIASES[name])
    return list(columns)


def _shape_of(recipe: Recipe, table: Dataset, source: str) -> str:
    """`prompt`, `alpaca`, `messages` or `text`: as the recipe says, or by the columns. DataError if none fits."""

    def fits(shape: str) -> bool:
        return all(column_of(recipe, name, table, source) is not None for name in _SHAPES[shape][0])

    form, names = recipe.data.format, table.column_names
    if form != "auto":
        if not fits(form):
            raise DataError(
                f"data.format: {form} needs {_needed(form)}, {source} has {', '.join(names)}; "
                "name its columns in data.columns.*"
            )
        return form
    # Columns that the recipe names take precedence over columns with a usual name.
    named = [shape for shape in _SHAPES if any(getattr(recipe.data.columns, name) for name in _SHAPES[shape][0])]
    shape = next((shape for shape in [*named, *_SHAPES] if fits(shape)), None)
    if all(column in names for column in _PREFERRED):
        raise DataError(f"{source} holds pairs of a chosen and a rejected answer: set task: dpo")
    if shape == "prompt" and "label" in names and all(label in (True, False, None) for label in table["label"]):
        raise DataError(
            f"{source} marks good answers in its column label, and instruct would learn the bad ones too: set "
            "task: kto; or, if all are to be learned, data.format: prompt"
        )
    if shape is None:
        shapes = "; ".join(map(_needed, _SHAPES))
        raise DataError(
            f"{source} has the columns {', '.join(names)}; instruct needs one of: {shapes}; name its "
            "columns in data.columns.*, for example data.columns.prompt"
        )
    return shape


def cells_of(row: Any, columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Key of `data.columns` -> the row's cell in its column; None where there is no such column."""
    return {name: row.get(column) for name, column in columns.items()}


def _needed(shape: str) -> str:
    return " + ".join(_SHAPES[shape][0])


def to_rows(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, str, list[str]]:
    """The rows in one of three forms, their original shape, and notes about parts that aren't read or learned.

    Texts: columns `prompt` and `completion`. Conversations: `messages` and `tools` as JSON text, and `learned`, the
    number of the message from which on answers are learned; where there are images also `images`, their `Source`s.
    Plain text: `text`. In all of them `row` is the number of the row in the file. Rows with an empty answer are left
    out (in Alpaca 28 are).

    Raises DataError for columns that don't fit and, counted together, for all rows that can't be read; or if no row has
    an answer.
    """
    from datasets import Dataset

    reader = reader_of(recipe, table, source)
    shape, columns = reader.shape, reader.columns
    if recipe.data.packing and shape != "text":
        raise DataError(
            f"data.packing: joins rows of plain text, and {source} has answers to learn, which would see each other's "
            "questions; train.group_by_length: true saves padding instead"
        )
    faults = Faults(source, len(table))
    made = faults.each(undecoded(table, columns.get("images")), reader.read)
    rows = [{**row, "row": number} for number, row in made.items()]
    _, notes = faults.settle(table, recipe.data.drop_missing)
    of_table = f"of {len(table)} rows of {source}"
    notes += unread_note(table, columns, source)
    empty = reader.counts.pop("", 0)
    notes += [f"{count} {of_table} {remark}" for remark, count in sorted(reader.counts.items())]
    if not rows:
        raise DataError(f"{source}: the answer is empty in every row; there is nothing to learn")
    notes += joined_bare(rows) if shape == "prompt" else []
    if empty:
        notes.append(f"left out {empty} {of_table}: their answer is empty")
    return Dataset.from_list(rows), "messages" if "messages" in rows[0] else shape, notes


def unread_note(table: Dataset, columns: Mapping[str, str | None], source: str) -> list[str]:
    """A note on the columns of the table that aren't among `columns`, if there are any."""
    unread = [f"'{column}'" for column in table.column_names if column not in columns.values()]
    return [f"{source}: column{'s' if len(unread) > 1 else ''} not read: {', '.join(unread)}"] if unread else []


def joined_bare(rows: list[dict[str, Any]]) -> list[str]:
    """A note if no prompt is separated from its answer."""
    if any("prompt" not in row or row["prompt"][-1:].isspace() or row["completion"][:1].isspace() for row in rows):
        return []
    return ["prompts and answers are joined with nothing in between; end prompts by a blank, or set data.as_chat: true"]


class RowReader:
    """Reads the rows of a table of one shape.

    `columns`: key of `data.columns` that the shape reads -> its column, None if there is none. `images` reads the rows'
    images, if they have any. `counts` has the parts that aren't learned, each with its number of rows, and under "" the
    rows without an answer.
    """

    def __init__(
        self, recipe: Recipe, shape: str, columns: Mapping[str, str | None], images: Images | None = None
    ) -> None:
        self.recipe, self.shape, self.columns, self.images = recipe, shape, columns, images
        self.counts: Counter[str] = Counter()

    def read(self, row: Any) -> dict[str, Any] | None:
        """One row in its form, None if its answer is empty. Raises RowFault."""
        return self.made(cells_of(row, self.columns))

    def made(self, cells: Mapping[str, Any]) -> dict[str, Any] | None:
        """Like `read`, from a row's cells by key of `data.columns`."""
        data = self.recipe.data
        named: list[Any] | None = None if self.images is None else []
        if self.shape == "messages":
            messages, unread = conversation(cells["messages"], data, named)
            return self._chat(cells, messages, 0, unread, named)
        if self.shape == "text":
            text = as_text(cells["text"])
            if text is None or not text.strip():
                raise RowFault("no text", gap=True)
            return {"text": text}
        prompt_cell, answer_cell = (cells[name] for name in _SHAPES[self.shape][0])
        before, answers = as_messages(prompt_cell), as_messages(answer_cell)
        if prompt_cell and answer_cell and (before is None) != (answers is None):
            raise RowFault("of prompt and answer one is a list of messages and one is a text; both have to be the same")
        if before is not None:
            messages, unread = conversation([*before, *(answers or [])], data, named)
            return self._chat(cells, messages, len(before), unread, named)
        prompt, answer, context = as_text(prompt_cell), as_text(answer_cell), as_text(cells.get("input"))
        if not (answer or "").strip():
            self.counts[""] += 1
            return None
        if not prompt and (prompt is None or self.shape == "alpaca"):
            raise RowFault("the prompt is empty", gap=True)
        if data.as_chat:
            turns = [*_history(cells.get("history")), {"role": "user", "content": with_context(prompt, context)}]
            return self._chat(cells, [*turns, {"role": "assistant", "content": answer}], len(turns), set(), named)
        for name in ("system", "history", "tools", "images"):
            if cells.get(name):
                self.counts[f"have {name}, which is learned only with data.as_chat: true"] += 1
        if self.shape == "alpaca":
            prompt = alpaca_prompt(str(prompt), context)
        return {"prompt": prompt, "completion": answer}

    def _chat(
        self, cells: Mapping[str, Any], messages: list[Message], learned: int, unread: set[str], named: list[Any] | None
    ) -> dict[str, Any] | None:
        """A conversation up to its last answer, with its system prompt, tools and images; None without an answer."""
        sources = []
        if self.images is not None:
            messages, sources = self.images.placed(messages, named or [], cells.get("images"))
        if (system := as_text(cells.get("system"))) and messages[0]["role"] != "system":
            messages, learned = with_system(messages, system), learned + 1
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not places or places[-1] < learned:
            raise RowFault("no message of the assistant", gap=True)
        for key in unread:
            self.counts[f"have {key} in their messages, which is not read"] += 1
        if places[-1] + 1 < len(messages):
            self.counts["go on after the last answer; the messages after it are left out"] += 1
        messages, rest = messages[: places[-1] + 1], messages[places[-1] + 1 :]
        sources = sources[: len(sources) - sum(message["content"].count(IMAGE) for message in rest)]
        answers = [messages[place] for place in places if place >= learned]
        if not any(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
            self.counts[""] += 1
            return None
        tools = tools_of(cells.get("tools"))
        row = {"messages": dumps(messages), "tools": dumps(tools), "learned": learned}
        return row if self.images is None else {**row, "images": sources}


def reader_of(recipe: Recipe, table: Dataset, source: str) -> RowReader:
    """The reader of a table's rows. Raises DataError for columns that don't fit."""
    shape = _shape_of(recipe, table, source)
    columns = {name: column_of(recipe, name, table, source) for part in _SHAPES[shape] for name in part}
    column = columns.get("messages")
    in_parts = column is not None and any(has_images(cell) for cell in table[column])
    with_images = recipe.task == "instruct" and (columns.get("images") is not None or in_parts)
    return RowReader(recipe, shape, columns, Images(source, recipe.data.image_folder) if with_images else None)


def _history(value: Any) -> list[Message]:
    """Earlier turns, as pairs of question and answer."""
    turns = []
    for pair in parsed(value) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault(f"history holds pairs of question and answer, got {str(pair)[:80]}")
        turns += [{"role": role, "content": str(text)} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns
