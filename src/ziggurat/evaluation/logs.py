"""The log-probabilities of answers under a trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from ziggurat.training.answers.load import Loaded


def answer_logs(loaded: Loaded, rows: Sequence[Any], batch: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of ln p over the answer's tokens of every row, and their number; rows are cut as in training."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    from ziggurat.recipe.schema import MOST_LENGTH
    from ziggurat.training.data.encode import longest

    length = longest(loaded.tokenizer, loaded.model.config, loaded.recipe.data.max_length or MOST_LENGTH)
    if cut := sum(len(ids) > length for ids, _ in rows):
        notes.append(f"{cut} of {len(rows)} rows are longer than {length} tokens and were cut")
    device = next(loaded.model.parameters()).device
    logs, counts = [], []
    for start in range(0, len(rows), batch):
        part = [(torch.tensor(ids[:length]), torch.tensor(mask[:length])) for ids, mask in rows[start : start + batch]]
        ids = pad_sequence([row for row, _ in part], batch_first=True).to(device)
        learned = pad_sequence([mask for _, mask in part], batch_first=True).to(device)[:, 1:]
        there = pad_sequence([torch.ones_like(mask) for _, mask in part], batch_first=True).to(device)
        with torch.no_grad():
            outputs = loaded.model(input_ids=ids, attention_mask=there).logits[:, :-1].float()
        losses = cross_entropy(outputs.transpose(1, 2), ids[:, 1:], reduction="none") * learned
        logs.append(-losses.sum(-1).cpu().double().numpy())
        counts.append(learned.sum(-1).cpu().numpy())
    total = np.concatenate(counts)
    if not total.any():
        raise DataError(f"--data: no row has an answer within {length} tokens")
    return np.concatenate(logs), total


def seen_logs(loaded: Loaded, table: Dataset, batch: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`answer_logs` of conversations with images, whole."""
    import torch
    from torch.nn.functional import cross_entropy

    from ziggurat.training.model.seeing import ImageCollator, expanded, text_of

    writer, device = loaded.writer, next(loaded.model.parameters()).device
    given: Any = table
    rows = [
        {
            "labels": [token if on else -100 for token, on in zip(*learned, strict=True)],
            "text": text_of(writer, row),
            "images": row.get("images") or [],
        }
        for row, learned in zip(given, expanded(loaded.recipe, writer, table, "scored", notes), strict=True)
    ]
    logs, counts = [], []
    for start in range(0, len(rows), batch):
        inputs = {name: value.to(device) for name, value in ImageCollator(writer)(rows[start : start + batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            outputs = loaded.model(**inputs).logits[:, :-1].float()
        losses = cross_entropy(outputs.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        logs.append(-losses.sum(-1).cpu().double().numpy())
        counts.append(labels.ne(-100).sum(-1).cpu().numpy())
    return np.concatenate(logs), np.concatenate(counts)
