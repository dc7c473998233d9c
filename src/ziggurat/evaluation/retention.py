"""Retention of the base model's ability: the perplexity of plain text, with the adapter and without."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ziggurat.errors import DataError

#: The most tokens that the model reads at once; a model with fewer positions reads fewer.
BLOCK = 512


def read_text(file: Path) -> str:
    """The text of a file in UTF-8. Raises DataError if it can't be read or has none."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"retention: '{file}' can't be read as text in UTF-8: {error}") from error
    if not text:
        raise DataError(f"retention: '{file}' is empty; name a file of plain text, some pages long")
    return text


def retention(model: Any, tokenizer: Any, text: str, batch: int = 8) -> tuple[dict[str, float], int]:
    """Scores of `text` and the number of scored tokens.

    `perplexity` is exp of the mean loss per token, the text cut into blocks of at most `BLOCK`; `before` is the same
    with the adapter switched off, if the model has one. Their quotient is the cost of training.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise DataError(f"retention: the text has {len(ids)} tokens; a file of plain text, some pages long, is needed")
    most = min(BLOCK, getattr(model.config.get_text_config(), "max_position_embeddings", BLOCK))
    blocks = [block for block in ids.split(most) if len(block) > 1]
    scores = {"perplexity": _perplexity(model, blocks, batch)}
    without: Any = getattr(model, "disable_adapter", None)
    if isinstance(getattr(model, "peft_config", None), dict) and without is not None:
        switched_off: AbstractContextManager[Any] = without()
        with switched_off:
            scores["before"] = _perplexity(model, blocks, batch)
    return scores, sum(len(block) - 1 for block in blocks)


@torch.no_grad()
def _perplexity(model: Any, blocks: list[Tensor], batch: int) -> float:
    total, tokens = 0.0, 0
    for first in range(0, len(blocks), batch):
        alike: dict[int, list[Tensor]] = {}
        for block in blocks[first : first + batch]:
            alike.setdefault(len(block), []).append(block)  # the last block may be shorter
        for rows in alike.values():
            ids = torch.stack(rows).to(model.device)
            predicted = ids[:, 1:].numel()
            total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * predicted
            tokens += predicted
    return torch.tensor(total / tokens, dtype=torch.float64).exp().item()
