"""Texts to token ids, and token ids to batches that are padded only as far as they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from datasets import Dataset


class Encoded(NamedTuple):
    """Training and validation rows as token ids, their greatest length (or that of an output), and notes."""

    train: Dataset
    validation: Dataset
    length: int
    notes: list[str]


def longest(tokenizer: PreTrainedTokenizerBase | None, config: Any, length: int) -> int:
    """`length` tokens, or fewer if the model has fewer positions."""
    limits = [length]
    if tokenizer is not None and isinstance(tokenizer.model_max_length, int) and tokenizer.model_max_length < 1_000_000:
        limits.append(tokenizer.model_max_length)
    limits.append(positions(config) or length)
    return min(limits)


def positions(config: Any) -> int | None:
    """The number of a model's positions; None if unknown."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    # RoBERTa counts positions from padding_idx + 1: two of its 514 are never used.
    return most - 2 if getattr(config, "model_type", "") in _SHIFTED else most


_SHIFTED = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "data2vec-text"}


def encode(
    table: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, separate: bool
) -> tuple[Dataset, list[int]]:
    """Token ids of every row, and its number of tokens; see `encode_texts`."""
    from datasets import Dataset

    if "tokens" in table.column_names:
        from .tags import encode_tagged

        columns, lengths = encode_tagged(table, tokenizer, max_length)
        return Dataset.from_dict(columns), lengths
    second = list(table["text_pair"]) if "text_pair" in table.column_names else None
    columns, lengths = encode_texts(list(table["text"]), second, tokenizer, max_length, separate=separate)
    if "label" in table.column_names:
        columns["labels"] = list(table["label"])
    return Dataset.from_dict(columns), lengths


def encode_texts(
    first: Sequence[str],
    second: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    separate: bool,
) -> tuple[dict[str, list[Any]], list[int]]:
    """Token ids as columns, one entry per row, and the number of tokens of each row before the cut.

    Two texts go into one sequence, or `separate` into `input_ids` and `second_ids`, of which the longer one counts.
    """
    columns: dict[str, list[Any]] = {}
    first, second = list(first), list(second) if second is not None else None
    if separate and second is not None:
        whole = [tokenizer(texts, truncation=False, verbose=False)["input_ids"] for texts in (first, second)]
        lengths = [max(len(a), len(b)) for a, b in zip(*whole, strict=True)]
        for name, texts in (("input_ids", first), ("second_ids", second)):
            columns[name] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    else:
        whole = tokenizer(first, second, truncation=False, verbose=False)["input_ids"]
        lengths = [len(ids) for ids in whole]
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        columns.update({name: encoded[name] for name in encoded if name != "attention_mask"})
    return columns, lengths


def spread(lengths: Sequence[int], subject: str) -> str:
    """The distribution of lengths in tokens, in words: median, 95th percentile, longest."""
    return (
        f"{subject} have {percentile(lengths, 50):,} tokens in the median, {percentile(lengths, 95):,} at the 95th "
        f"percentile, {max(lengths):,} at most"
    )


def percentile(lengths: Sequence[int], percent: int) -> int:
    """The smallest length that `percent` per cent of the rows don't exceed."""
    return sorted(lengths)[max(0, -(-len(lengths) * percent // 100) - 1)]


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
            if isinstance(labels[0], list) and isinstance(labels[0][0], int):  # a label for each token
                width, pads_left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
                fill = [[-100] * (width - len(row)) for row in labels]
                labels = [
                    [*ignored, *row] if pads_left else [*row, *ignored]
                    for row, ignored in zip(labels, fill, strict=True)
                ]
            batch["labels"] = torch.tensor(labels)  # of float32 or int64
        return batch
