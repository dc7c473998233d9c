"""Vision-language models: their conversations as token ids with loss masks, and their batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ziggurat.errors import DataError
from ziggurat.recipe.schema import Recipe

from ..data.chat import IMAGE, Message
from ..data.encode import Encoded, longest, spread
from ..data.examples import Examples
from ..data.images import Source, open_image
from ..data.template import asked_ids, common_start, rendered
from ..data.tokens import STEP, Row, tell_of_cuts, tokens_of
from .generate import Asked

if TYPE_CHECKING:
    from datasets import Dataset

#: Inputs that have a column for each token.
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: The number of tokens before an answer that distinguish it from the same words elsewhere.
_CONTEXT = 4


class Writer:
    """A processor with the interface of a tokenizer for `template`: its messages are texts with the mark `IMAGE`.

    Chat templates of such models take messages in parts; images become one token each, which the processor later
    repeats once for each of the image's positions.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.images = _image_tokens(processor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *texts: Any, **how: Any) -> Any:
        return self.tokenizer(*texts, **how)

    def get_chat_template(self, **how: Any) -> str:
        """Empty: answers are located by rendering, since a template's marks don't count the images' positions."""
        return ""

    def apply_chat_template(
        self, messages: list[Message], tools: Any = None, *, tokenize: bool = True, return_dict: bool = True, **how: Any
    ) -> Any:
        parts = [{**message, "content": _parts(message["content"])} for message in messages]
        text = self.processor.apply_chat_template(parts, tools=tools, tokenize=False, **how)
        return self.tokenizer(text, add_special_tokens=False, verbose=False) if tokenize else text

    def asked(self, messages: list[Message], tools: Any, images: list[Source]) -> Asked:
        """Messages to be answered, opened as in training; see `template.asked_ids`."""
        writer = cast(Any, self)
        answered = rendered(writer, [*messages, {"role": "assistant", "content": "Yes"}], tools)
        opened = rendered(writer, messages, tools, add_generation_prompt=True)
        return Asked(opened[: common_start(opened, answered)], images)

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[Source]], side: str = "right") -> dict[str, Any]:
        """A padded batch of rendered texts and their images, as model inputs."""
        opened = [[open_image(source) for source in row] for row in images]
        how: dict[str, Any] = {"padding": True, "padding_side": side, "add_special_tokens": False}
        return dict(
            self.processor(text=list(texts), images=opened if any(opened) else None, return_tensors="pt", **how)
        )


def _parts(text: str) -> list[dict[str, str]]:
    """A text with image marks as the parts of a message."""
    parts: list[dict[str, str]] = []
    for place, piece in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] * bool(place)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts or [{"type": "text", "text": ""}]


def _image_tokens(processor: Any) -> set[int]:
    """The tokens of an image: that of its positions, and that of a chat template if it differs (Gemma 3)."""
    named = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
    return {processor.tokenizer.convert_tokens_to_ids(token) for token in named if token is not None}


def encode_images(recipe: Recipe, writer: Any, config: Any, examples: Examples) -> Encoded:
    """Training and validation rows of conversations with images, their greatest length, and notes.

    Columns: `input_ids` with all positions of images, `labels`, and `text` and `images`, from which batches are made.
    Rows that would be cut within their images are left out.

    Raises DataError that counts the rows which the chat template refuses, or if none of a part is left.
    """
    notes: list[str] = []
    parts = [(table, word, expanded(recipe, writer, table, word, notes)) for table, word in examples.parts]
    lengths = [len(ids) for ids, _ in parts[0][2]]
    notes.append(f"{spread(lengths, 'training rows')}, images among them")
    limit = recipe.data.max_length
    # A cut row may lose an image, so without a user's length all rows fit, up to the model's positions.
    length = longest(writer.tokenizer, config.get_text_config(), limit or -(-max(lengths) // STEP) * STEP)
    if limit is None or length < limit:
        notes.append(f"data.max_length is {length} tokens: " + ("the longest row" if limit is None else "the model's"))
    train, validation = (_cut(recipe, writer, *part, length, notes) for part in parts)
    return Encoded(train, validation, length, notes)


def expanded(recipe: Recipe, writer: Any, table: Dataset, word: str, notes: list[str]) -> list[Row]:
    """Token ids with all positions of images, and a loss mask, of every row. Raises DataError."""
    rows = []
    for row, (ids, mask) in zip(table, tokens_of(recipe, writer, table, word, notes), strict=True):
        assert isinstance(row, dict)
        learned = [int(token not in writer.images) for token in ids] if recipe.data.loss == "all" else mask
        full = writer.inputs([text_of(writer, row)], [row.get("images") or []])["input_ids"][0].tolist()
        try:
            rows.append((full, along(ids, learned, full, writer.images)))
        except DataError as error:
            raise DataError(f"{recipe.data.train}, row {row['row']}: {error}") from error
    return rows


def text_of(writer: Any, row: dict[str, Any]) -> str:
    """The rendered conversation of a row of `instruct.to_rows`."""
    return rendered(writer, json.loads(row["messages"]), json.loads(row["tools"]))


def along(ids: Sequence[int], mask: Sequence[int], full: Sequence[int], images: set[int]) -> list[int]:
    """The mask of `ids`, in which each image is one of `images`, mapped to the ids `full` with all image positions.

    Each run of learned tokens is found again after the one before it, with the help of the few tokens in front of it.
    """
    mapped, start, place = [0] * len(full), 0, 0
    while place < len(ids):
        if not mask[place]:
            place += 1
            continue
        end = place
        while end < len(ids) and mask[end]:
            end += 1
        before = place
        while before and place - before < _CONTEXT and ids[before - 1] not in images and not mask[before - 1]:
            before -= 1
        run = list(ids[before:end])
        at = next((at for at in range(start, len(full) - len(run) + 1) if list(full[at : at + len(run)]) == run), None)
        if at is None:
            raise DataError("the processor writes an answer differently from the chat template")
        start = at + len(run)
        mapped[start - (end - place) : start] = [1] * (end - place)
        place = end
    return mapped


def _cut(recipe: Recipe, writer: Any, table: Dataset, word: str, rows: list[Row], length: int, notes: list[str]) -> Any:
    from datasets import Dataset

    fitting, cut, unanswered, torn = [], 0, 0, 0
    for row, (ids, mask) in zip(table, rows, strict=True):
        assert isinstance(row, dict)
        cut += len(ids) > length
        if writer.images.intersection(ids[length:]):
            torn += 1
            continue
        ids, mask = ids[:length], mask[:length]
        if not any(mask[1:]):
            unanswered += 1
            continue
        labels = [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]
        made = {"input_ids": ids, "labels": labels, "text": text_of(writer, row), "images": row.get("images") or []}
        fitting.append(made)
    if torn:
        notes.append(f"{torn} of {len(table)} {word} rows have images beyond {length} tokens and are left out")
    tell_of_cuts(recipe, length, word, len(table), cut, unanswered, len(table) - len(fitting), notes)
    return Dataset.from_list(fitting)


class ImageCollator:
    """Batches of rows of `encode_images`: images are read and prepared as they are needed."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.writer.inputs([row["text"] for row in rows], [row["images"] for row in rows])
        width = max(len(row["labels"]) for row in rows)
        batch |= {name: batch[name][:, :width] for name in _OF_TOKENS if name in batch}
        labels = torch.full_like(batch["input_ids"], -100)
        for place, row in enumerate(rows):
            labels[place, : len(row["labels"])] = torch.tensor(row["labels"])
            batch["attention_mask"][place, len(row["labels"]) :] = 0
        return {**batch, "labels": labels}


def writer_of(tokenizer: Any, processor: Any) -> Any:
    """The tokenizer, or the `Writer` of a processor: both apply a chat template to messages."""
    return tokenizer if processor is None else Writer(processor)


def question_of(writer: Any, row: dict[str, Any]) -> tuple[Any, str, str] | None:
    """A prompt of `generate`, the question in words, and its (last) answer, for a row of `instruct.to_rows`.

    `writer`: the tokenizer, or the `Writer` of a processor; an image is shown by its name. None for plain text, which
    has no question, and for answers that consist of tool calls only.
    """
    if "prompt" in row:
        return list(writer(row["prompt"], verbose=False)["input_ids"]), row["prompt"], row["completion"]
    if "messages" not in row:
        return None
    messages, tools = json.loads(row["messages"]), json.loads(row["tools"])
    place = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    before, answer = messages[:place], messages[place]["content"]
    if not before or not answer.strip():
        return None
    if not isinstance(writer, Writer):
        return asked_ids(writer, before, tools), before[-1]["content"], answer
    prompt = writer.asked(before, tools, row.get("images") or [])
    return prompt, before[-1]["content"].replace(IMAGE, "[image] "), answer
