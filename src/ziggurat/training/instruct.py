"""Instruction data as prompt and completion, in whichever of the three usual shapes they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError

from .schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

# The Alpaca prompt (tatsu-lab/stanford_alpaca, train.py), which MSPLoRA's instruction runs use: models that were
# tuned on it expect it to the letter.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_COLUMNS = {
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
}
#: Columns of instruction data that hold texts, whatever their texts look like.
TEXTS = ("prompt", "completion", "instruction", "input", "output")


def alpaca_prompt(instruction: str, context: str | None = None) -> str:
    """The Alpaca prompt of one instruction, with the input's section only where there is an input."""
    if context and context.strip():
        return _WITH_INPUT.format(instruction=instruction, input=context)
    return _WITHOUT_INPUT.format(instruction=instruction)


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


def to_prompts(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, str | None]:
    """Columns `prompt` and `completion`: texts, or lists of messages that the model's chat template will join.

    Of a conversation the last assistant message is the completion, everything before it the prompt. Rows with an
    empty answer, of which Alpaca has 28, are left out; the second result says how many.
    Raises DataError for columns that don't fit, no answer at all, or a conversation that doesn't end with an answer.
    """
    from datasets import Dataset

    shape = shape_of(recipe, table, source)
    prompts: list[Any] = []
    completions: list[Any] = []
    empty = 0
    for index, row in enumerate(table):
        assert isinstance(row, dict)
        where = f"{source}, row {index + 1}"
        if shape == "messages":
            prompt, completion = _split_conversation(row["messages"], where)
        elif shape == "alpaca":
            said, context = _plain(row["instruction"]), _plain(row.get("input"))
            prompt = alpaca_prompt(said, context) if said is not None else None
            completion = _plain(row["output"])
        else:
            prompt, completion = _plain(row["prompt"]), _plain(row["completion"])
        if completion is None or (isinstance(completion, str) and not completion.strip()):
            empty += 1
            continue
        if prompt is None:
            raise DataError(f"{where}: the prompt is empty; take the row out")
        prompts.append(prompt)
        completions.append(completion)
    if not completions:
        raise DataError(f"{source}: the answer is empty in every row; there is nothing to learn")
    note = f"left out {empty} of {len(table)} rows of {source}: their answer is empty" if empty else None
    return Dataset.from_dict({"prompt": prompts, "completion": completions}), note


def _plain(value: Any) -> Any:
    """A number or a date as a text, for a table may have columns that hold nothing else; all else as it is."""
    return value if value is None or isinstance(value, str | list | dict) else str(value)


def _split_conversation(messages: Any, where: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    turns = []
    for message in messages or []:
        # A table gives every message the keys that one of them has, and None where it had no such key.
        if not isinstance(message, dict) or None in (message.get("role"), message.get("content")):
            raise DataError(f"{where}: each message needs role and content, got {message!r}")
        turns.append({"role": str(message["role"]), "content": str(message["content"])})
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "nothing"
        raise DataError(f"{where}: a conversation must end with a message of the assistant, this ends with {last}")
    return turns[:-1], turns[-1:]
