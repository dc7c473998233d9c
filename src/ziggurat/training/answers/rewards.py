"""Rewards of answers by a trained reward model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ziggurat.errors import DataError
from ziggurat.recipe.schema import MOST_LENGTH

from ..data.encode import longest
from ..data.instruct import dumps
from ..data.tokens import Row, tokens_of

if TYPE_CHECKING:
    from .load import Loaded


def answered(loaded: Loaded, prompts: Sequence[str], answers: Sequence[str] | None) -> list[dict[str, Any]]:
    """Prompts with their answers as rows of `to_rows`. Raises DataError without answers."""
    if answers is None:
        raise DataError("this adapter rates answers: give a prompt and an answer to it, or a table with both")
    pairs = list(enumerate(zip(prompts, answers, strict=True), 1))
    if loaded.run.get("shape") != "messages":
        return [{"prompt": prompt, "completion": answer, "row": row} for row, (prompt, answer) in pairs]
    talks = (
        (row, [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        for row, (prompt, answer) in pairs
    )
    return [{"messages": dumps(talk), "tools": "[]", "learned": 1, "row": row} for row, talk in talks]


def rewards_of(loaded: Loaded, rows: Any, batch: int, notes: list[str]) -> Iterator[float]:
    """The reward of each row of `to_rows`, in order. `notes` gets how many rows are cut."""
    ids = [_rated(row) for row in tokens_of(loaded.recipe, loaded.tokenizer, rows, "rated", notes)]
    length = longest(loaded.tokenizer, loaded.model.config, loaded.recipe.data.max_length or MOST_LENGTH)
    if cut := sum(len(row) > length for row in ids):
        notes.append(f"{cut} of {len(ids)} rows are longer than {length} tokens and were cut")
    device, pad = next(loaded.model.parameters()).device, loaded.tokenizer.pad_token_id
    for start in range(0, len(ids), batch):
        part = [torch.tensor(row[:length]) for row in ids[start : start + batch]]
        mask = pad_sequence([torch.ones_like(row) for row in part], batch_first=True).to(device)
        inputs = pad_sequence(part, batch_first=True, padding_value=pad).to(device)  # type: ignore[arg-type]
        with torch.no_grad():
            yield from loaded.model(input_ids=inputs, attention_mask=mask).logits[:, 0].float().tolist()


def _rated(row: Row) -> list[int]:
    """The token ids up to the end of the answer, the position of the reward."""
    ids, mask = row
    return ids[: len(mask) - mask[::-1].index(1)]
