"""The log-probabilities of answers under a trained adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ziggurat.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from ziggurat.training.answers.load import Loaded


def answer_logs(loaded: Loaded, rows: Sequence[Any], batch: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of ln p over the answer's tokens of every row, and their number; rows are cut as in training."""
    from ziggurat.recipe.schema import MOST_LENGTH
    from ziggurat.training.data.encode import longest

    length = longest(loaded.tokenizer, loaded.model.config, loaded.recipe.data.max_length or MOST_LENGTH)
    if cut := sum(len(ids) > length for ids, _ in rows):
        notes.append(f"{cut} of {len(rows)} rows are longer than {length} tokens and were cut")

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), batch):
            part = [
                (torch.tensor(ids[:length]), torch.tensor(mask[:length])) for ids, mask in rows[start : start + batch]
            ]
            yield {
                "input_ids": pad_sequence([ids for ids, _ in part], True),
                "attention_mask": pad_sequence([torch.ones_like(ids) for ids, _ in part], True),
                "labels": pad_sequence([ids.masked_fill(mask == 0, -100) for ids, mask in part], True, -100),
            }

    logs, counts = _logs(loaded, batches())
    if not counts.any():
        raise DataError(f"--data: no row has an answer within {length} tokens")
    return logs, counts


def seen_logs(loaded: Loaded, table: Dataset, batch: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`answer_logs` of conversations with images, whole."""
    from ziggurat.training.model.seeing import ImageCollator, expanded, text_of

    writer, table_rows = loaded.writer, table.to_list()
    rows = [
        {
            "labels": [token if on else -100 for token, on in zip(*learned, strict=True)],
            "text": text_of(writer, row),
            "images": row.get("images") or [],
        }
        for row, learned in zip(table_rows, expanded(loaded.recipe, writer, table, "scored", notes), strict=True)
    ]
    collate = ImageCollator(writer)
    return _logs(loaded, (collate(rows[start : start + batch]) for start in range(0, len(rows), batch)))


@torch.no_grad()
def _logs(loaded: Loaded, batches: Iterator[dict[str, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    device = next(loaded.model.parameters()).device
    logs, counts = [], []
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        scores = loaded.model(**inputs).logits[:, :-1].float()
        losses = cross_entropy(scores.transpose(1, 2), labels, reduction="none")  # 0 where a label is -100
        logs.append(-losses.sum(-1).cpu().double().numpy())
        counts.append(labels.ne(-100).sum(-1).cpu().numpy())
    return np.concatenate(logs), np.concatenate(counts)
