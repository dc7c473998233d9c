"""Instruction data as prompt and completion, in whichever of the three usual shapes they come."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

# The Alpaca prompt (tatsu-lab/stanford_alpaca, train.py), which MSPLoRA's instruction runs use: models that were
# tuned on it expect it to the letter.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
#: How the prompt ends, as run.json says it: a run that says nothing was trained with a line break.
TO_THE_LETTER, WITH_LINE_BREAK = "stanford_alpaca", "line break"
_COLUMNS = {
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
}
#: Columns beside these that a chat template could put into the prompt.
_UNREAD = ("tools", "images", "chat_template_kwargs")
#: Columns of instruction data that hold texts, whatever their texts look like.
TEXTS = ("prompt", "completion", "instruction", "input", "output")


def alpaca_prompt(instruction: str, context: str | None = None, form: str = TO_THE_LETTER) -> str:
    """The Alpaca prompt of one instruction, with the input's section only where there is an input."""
    end = "\n" if form == WITH_LINE_BREAK else ""
    if context and context.strip():
        return _WITH_INPUT.format(instruction=instruction, input=context) + end
    return _WITHOUT_INPUT.format(instruction=instruction) + end


def shape_of(recipe: Recipe, table: Dataset, source: str) -> str:
    """`prompt`, `alpaca` or `messages`: as the recipe says, or by the columns. DataError when none fits."""
    names = table.column_names
    wanted = recipe.data.format
    if wanted != "auto":
        missing = [column for column in _COLUMNS[wanted] if column not in names]
        if missing:
            raise DataError(
                f"data.format: {wanted} needs the columns {' and '.join(_COLUMNS[wanted])}, {source} has "
                f"{', '.join(names)}"
            )
        return wanted
    for shape, columns in _COLUMNS.items():
        if all(column in names for column in columns):
            return shape
    shapes = "; ".join(" + ".join(columns) for columns in _COLUMNS.values())
    raise DataError(f"{source} has the columns {', '.join(names)}; instruct needs one of: {shapes}")


def to_prompts(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, list[str]]:
    """Columns `prompt` and `completion`: texts, or lists of messages that the model's chat template will join.

    Of a conversation the last assistant message is the completion, everything before it the prompt. The completion of
    a row with an empty answer is None. The second result says what of the rows is not learned.
    Raises DataError for columns that don't fit, an empty prompt, what is no text, a call of tools, or a conversation
    that doesn't end with an answer.
    """
    from datasets import Dataset

    shape = shape_of(recipe, table, source)
    prompts: list[Any] = []
    completions: list[Any] = []
    lost: Counter[str] = Counter()
    for index, row in enumerate(table):
        assert isinstance(row, dict)
        where = f"{source}, row {index + 1}"
        unread = {column for column in _UNREAD if row.get(column)}
        if shape == "messages":
            turns = _turns(row["messages"], where, unread)
            prompt, completion = turns[:-1], turns[-1:]
        elif shape == "alpaca":
            said, context = _text(row["instruction"], where), _text(row.get("input"), where)
            prompt = alpaca_prompt(said, context) if said is not None else None
            completion = _text(row["output"], where)
        elif isinstance(row["prompt"], list):
            turns = _turns([*row["prompt"], *(row["completion"] or [])], where, unread)
            prompt, completion = turns[: len(row["prompt"])], turns[len(row["prompt"]) :]
        else:
            prompt, completion = _text(row["prompt"], where), _text(row["completion"], where)
        lost.update(unread)
        answers = [turn["content"] for turn in completion] if isinstance(completion, list) else [completion or ""]
        if not "".join(answers).strip():
            completion = None
        elif not prompt and prompt != "":
            raise DataError(f"{where}: the prompt is empty; take the row out")
        prompts.append(prompt)
        completions.append(completion)
    rows = f"of {len(table)} rows of {source}"
    notes = [f"{count} {rows} have {key}, which is not learned" for key, count in sorted(lost.items())]
    return Dataset.from_dict({"prompt": prompts, "completion": completions}), notes


def with_answers(table: Dataset, source: str) -> tuple[Dataset, str | None]:
    """The rows whose answer is not empty (in Alpaca 28 are), and a note of how many others there are.

    Raises DataError if there is none.
    """
    kept = [index for index, completion in enumerate(table["completion"]) if completion is not None]
    if not kept:
        raise DataError(f"{source}: the answer is empty in every row; there is nothing to learn")
    empty = len(table) - len(kept)
    if not empty:
        return table, None
    return table.select(kept), f"left out {empty} of {len(table)} rows of {source}: their answer is empty"


def _text(value: Any, where: str) -> str | None:
    """A number or a date as a text, for a table may have columns that hold nothing else. DataError for a list, say."""
    if isinstance(value, bytes | list | dict):
        raise DataError(f"{where}: a text is needed, this is of type {type(value).__name__}: {str(value)[:80]}")
    return None if value is None else str(value)


def _turns(messages: Any, where: str, unread: set[str]) -> list[dict[str, str]]:
    """Messages with their role and content alone; `unread` gets the other keys that have a value."""
    turns = []
    for message in messages or []:
        # A table gives every message the keys that one of them has, and None where it had no such key.
        given = {key: value for key, value in message.items() if value} if isinstance(message, dict) else {}
        if calls := next((key for key in ("tool_calls", "function_call") if key in given), None):
            raise DataError(f"{where}: a message calls tools ({calls}), which can't be learned yet; take the row out")
        if not isinstance(message, dict) or None in (message.get("role"), message.get("content")):
            raise DataError(f"{where}: each message needs role and content, got {message!r}")
        unread |= given.keys() - {"role", "content"}
        turns.append({"role": str(message["role"]), "content": _content(message["content"], where)})
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nothing"
        raise DataError(f"{where}: a conversation must end with a message of the assistant, this ends with {last}")
    return turns


def _content(content: Any, where: str) -> str:
    """The text of a message, which may come in parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or None in texts:
        raise DataError(f"{where}: a message holds parts that are no texts, and only texts are learned: {content!r}")
    return "".join(str(_text(text, where)) for text in texts)
