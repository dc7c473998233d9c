"""Texts to token ids, and token ids to batches that are padded only as far as they need."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset


def longest(tokenizer: PreTrainedTokenizerBase | None, config: Any, wanted: int) -> int:
    """`wanted` tokens, or fewer where the model has fewer positions."""
    limits = [wanted]
    if tokenizer is not None and isinstance(tokenizer.model_max_length, int) and tokenizer.model_max_length < 1_000_000:
        limits.append(tokenizer.model_max_length)
    limits.append(positions(config) or wanted)
    return min(limits)


def positions(config: Any) -> int | None:
    """How many tokens a model has positions for; None where it doesn't say."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    # RoBERTa counts positions from padding_idx + 1: two of its 514 are never used.
    return most - 2 if getattr(config, "model_type", "") in _SHIFTED else most


_SHIFTED = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "data2vec-text"}


def encode(
    table: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, separate: bool
) -> tuple[Dataset, int]:
    """Token ids of every row, and how many rows were cut; see `encode_texts`."""
    from datasets import Dataset

    second = list(table["text_pair"]) if "text_pair" in table.column_names else None
    columns, cut = encode_texts(list(table["text"]), second, tokenizer, max_length, separate=separate)
    if "label" in table.column_names:
        columns["labels"] = list(table["label"])
    return Dataset.from_dict(columns), cut


def encode_texts(
    first: Sequence[str],
    second: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    separate: bool,
) -> tuple[dict[str, list[Any]], int]:
    """Token ids as columns, one entry a row, and how many rows were cut.

    Two texts go into one sequence, or `separate` into `input_ids` and `second_ids`.
    """
    columns: dict[str, list[Any]] = {}
    first, second = list(first), list(second) if second is not None else None
    if separate and second is not None:
        whole = [tokenizer(texts, truncation=False, verbose=False)["input_ids"] for texts in (first, second)]
        cut = sum(max(len(a), len(b)) > max_length for a, b in zip(*whole, strict=True))
        for name, texts in (("input_ids", first), ("second_ids", second)):
            columns[name] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    else:
        whole = tokenizer(first, second, truncation=False, verbose=False)["input_ids"]
        cut = sum(len(ids) > max_length for ids in whole)
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        columns.update({name: encoded[name] for name in encoded if name != "attention_mask"})
    return columns, cut


def encode_answers(
    table: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, answer_only: bool
) -> tuple[Dataset, int, int]:
    """Token ids of prompt and completion with a `completion_mask`, how many rows were cut, how many lost the answer.

    A completion begins where the prompt's tokens and those of the whole part. Rows without a token to learn are left
    out: with `answer_only` those whose prompt fills `max_length`.
    """
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    cut = unanswered = 0
    for row in table:
        prompt, whole = _with_answer(tokenizer, row["prompt"], row["completion"])  # type: ignore[call-overload]
        start = common_start(prompt, whole)
        cut += len(whole) > max_length
        whole = whole[:max_length]
        # The first token is predicted from nothing, so nothing is learned from it.
        unanswered += max(start, 1) >= len(whole)
        if max(start if answer_only else 0, 1) < len(whole):
            columns["input_ids"].append(whole)
            columns["completion_mask"].append([int(place >= start) for place in range(len(whole))])
    return Dataset.from_dict(columns), cut, unanswered


def _with_answer(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt alone, and of prompt and completion: messages, or texts that end in the end-of-text."""
    if isinstance(prompt, list):
        return chat_ids(tokenizer, prompt, add_generation_prompt=True), chat_ids(tokenizer, prompt + completion)
    end = str(tokenizer.eos_token)
    whole = prompt + completion + ("" if completion.endswith(end) else end)
    return tokenizer(prompt, verbose=False)["input_ids"], tokenizer(whole, verbose=False)["input_ids"]


def asked_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of messages that an answer is to follow, as `encode_answers` learned them.

    That is what the generation prompt has in common with a conversation that goes on: some templates open a thought in
    the one that the other lacks.
    """
    answered = chat_ids(tokenizer, [*messages, {"role": "assistant", "content": "Yes"}])
    opened = chat_ids(tokenizer, messages, add_generation_prompt=True)
    return opened[: common_start(opened, answered)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token by which the chat template ends an answer; None if it ends it by none of its own."""
    turns = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes"}]
    tail = _rendered(tokenizer, turns, tokenize=False).rpartition("Yes")[2]
    ids: Any = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **how: Any) -> list[int]:
    """Token ids of messages joined by the tokenizer's chat template. Raises DataError if it refuses them."""
    return list(_rendered(tokenizer, messages, tokenize=True, return_dict=True, **how)["input_ids"])


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses messages of {roles}: {first_line(error)}") from error


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common before they part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class Collator:
    """Pads a batch to its longest row. Two separate texts become ids of shape (batch, 2, length)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.multiple = multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [row["labels"] for row in rows] if "labels" in rows[0] else None
        second = [{"input_ids": row["second_ids"]} for row in rows] if "second_ids" in rows[0] else []
        inputs = [{key: value for key, value in row.items() if key not in ("labels", "second_ids")} for row in rows]
        # tokenizer.pad warns about its own speed and would return ids only; the mask follows from the lengths.
        padded = self.tokenizer.pad(
            [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in [*inputs, *second]],
            padding=True,
            pad_to_multiple_of=self.multiple,
            return_tensors="pt",
        )
        batch: dict[str, Any] = dict(padded)
        if second:
            batch = {key: value.unflatten(0, (2, len(rows))).transpose(0, 1) for key, value in batch.items()}
        if labels is not None:
            kind = torch.float32 if isinstance(labels[0], float) else torch.long
            batch["labels"] = torch.tensor(labels, dtype=kind)
        return batch
