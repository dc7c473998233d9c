"""Prompts that a model answers during training, with the columns for its rewards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from .alpaca import alpaca_prompt, with_context
from .chat import Message, as_messages, as_text, conversation, with_system
from .encode import positions, spread
from .examples import Examples
from .faults import Faults, RowFault
from .instruct import cells_of, column_of, dumps
from .template import chat_ids

if TYPE_CHECKING:
    from datasets import Dataset

#: The columns of a prompt; the first one that exists counts.
_PROMPTS = ("prompt", "messages", "instruction")
#: Names of reward functions' other arguments, which a column can't have.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
RESERVED += ("image", "images", "environment")
#: TRL keeps a column of this name from reward functions.
_OWN = "completion"
#: The name of the prompts while those of the file are removed: a table without a column would lose its rows.
_MADE = "ziggurat's prompt"


def to_prompts(recipe: Recipe, table: Dataset, source: str) -> tuple[Dataset, str, list[str]]:
    """The rows with `prompt`, a text or messages as JSON text, and all columns that aren't part of the prompt.

    A conversation ends before its last answer, which is left out. Raises DataError for missing columns, columns with
    reserved names, and, counted together, for all unreadable rows.
    """
    names = [name for name in _PROMPTS if getattr(recipe.data.columns, name)] or _PROMPTS
    shape, column = next(
        ((name, found) for name in names if (found := column_of(recipe, name, table, source)) is not None), ("", "")
    )
    if not column:
        raise DataError(
            f"{source} has the columns {', '.join(table.column_names)}; {recipe.task} needs prompt, messages or "
            "instruction; name its columns in data.columns.*, for example data.columns.prompt"
        )
    besides = {name: column_of(recipe, name, table, source) for name in ("system", "input")}
    if shape != "instruction":
        besides["input"] = None
    faults = Faults(source, len(table))
    of_prompt = {column, *besides.values(), "prompt"}
    answers = {*table.column_names} - of_prompt
    compared = recipe.rewards.answer if _comparing(recipe) and recipe.rewards.answer in answers else None

    def prompt(row: dict[str, Any]) -> str | list[Message]:
        if compared is not None and not (as_text(row[compared]) or "").strip():
            raise RowFault(f"column '{compared}' holds no right answer", gap=True)
        return _prompt(recipe, shape, row[column], cells_of(row, besides))

    prompts = faults.each(table, prompt)
    kinds = {isinstance(prompt, str) for prompt in prompts.values()}
    if len(kinds) > 1:
        raise DataError(f"{source}: some prompts are lists of messages and some are texts; all have to be the same")
    rows, notes = faults.settle(table, recipe.data.drop_missing)
    rows = rows.add_column(_MADE, [text if isinstance(text, str) else dumps(text) for text in prompts.values()])
    rows = rows.remove_columns([name for name in table.column_names if name in of_prompt])
    rows = rows.rename_column(_MADE, "prompt")
    notes += _check_columns(recipe, rows, source, of_prompt)
    rows = rows.remove_columns([name for name in rows.column_names if name == _OWN])
    return rows, "messages" if kinds == {False} else "alpaca" if shape == "instruction" else "prompt", notes


def _comparing(recipe: Recipe) -> set[str]:
    """The rewards of the recipe that compare with a right answer."""
    return {"exact", "last_number"}.intersection(recipe.rewards.functions or ())


def _check_columns(recipe: Recipe, rows: Dataset, source: str, of_prompt: set[str | None]) -> list[str]:
    taken = [name for name in rows.column_names if name in RESERVED]
    if taken:
        raise DataError(f"{source}: reward functions get something else as {', '.join(taken)}; rename the column")
    needed = _comparing(recipe)
    answer = recipe.rewards.answer
    if needed and answer not in {*rows.column_names} - {"prompt", _OWN}:
        others = ", ".join(name for name in rows.column_names if name not in of_prompt) or "none"
        raise DataError(
            f"rewards.answer: {', '.join(sorted(needed))} compares with column '{answer}', "
            + ("which is part of the prompt; other" if answer in of_prompt else "and that column isn't there; other")
            + f" columns of {source}: {others}"
            + (f"; '{_OWN}' is reserved for completions: rename the column" if _OWN in rows.column_names else "")
        )
    if _OWN in rows.column_names:
        return [f"{source}: column '{_OWN}' doesn't reach reward functions, which get the model's own; rename it"]
    return []


def _prompt(recipe: Recipe, shape: str, value: Any, cells: dict[str, Any]) -> str | list[Message]:
    """A text, or the messages to be answered. Raises RowFault."""
    system = as_text(cells.get("system"))
    if shape == "messages" or as_messages(value) is not None:
        messages, _ = conversation(value, recipe.data)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise RowFault("no message to be answered", gap=True)
    else:
        text, context = as_text(value), as_text(cells.get("input"))
        if not (text or "").strip():
            raise RowFault("the prompt is empty", gap=True)
        if not recipe.data.as_chat:
            return alpaca_prompt(str(text), context) if shape == "instruction" else str(text)
        messages = [{"role": "user", "content": with_context(text, context)}]
    return with_system(messages, system or None)


def opened(row: dict[str, Any], shape: str | None) -> str | list[Message]:
    """The prompt of a row of `to_prompts`, in TRL's form."""
    return json.loads(row["prompt"]) if shape == "messages" else row["prompt"]


def fitting_prompts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, examples: Examples
) -> tuple[Dataset, Dataset, list[str]]:
    """Training and validation rows whose prompts leave room for a completion, and notes that count the others.

    Raises DataError if none is left, or if the model has no positions for a completion of that length.
    """
    most = positions(config)
    room = None if most is None else most - recipe.sampling.tokens
    if room is not None and room < 1:
        raise DataError(f"sampling.tokens: {recipe.sampling.tokens}, and {recipe.model} takes {most} with the prompt")
    limit = min((n for n in (room, recipe.data.max_length) if n is not None), default=None)
    parts, notes = [], []
    for table, word in examples.parts:
        lengths = [_length(tokenizer, opened(dict(row), examples.shape)) for row in table]
        if word == "training":
            notes.append(f"{spread(lengths, 'prompts')}; completions have at most {recipe.sampling.tokens} tokens")
        fitting = [index for index, length in enumerate(lengths) if limit is None or length <= limit]
        if not fitting:
            shortest = f"the shortest of the {len(table)} {word} prompts has {min(lengths)} tokens"
            if limit == recipe.data.max_length:
                raise DataError(f"data.max_length: {limit}, and {shortest}; raise it")
            raise DataError(
                f"sampling.tokens: {recipe.sampling.tokens} of the {most} positions of {recipe.model} leave {limit} "
                f"for a prompt, and {shortest}; lower it, or shorten the prompts"
            )
        if len(fitting) < len(table):
            notes.append(f"{len(table) - len(fitting)} of {len(table)} {word} prompts have more than {limit} tokens "
                         "and are left out")  # fmt: skip
        parts.append(table.select(fitting))
    return parts[0], parts[1], notes


def _length(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt, verbose=False)["input_ids"])
    return len(chat_ids(tokenizer, prompt, add_generation_prompt=True))
