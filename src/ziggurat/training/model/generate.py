"""Generating answers to prompts, of texts or of texts and images, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError

from ..data.encode import positions

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from ..data.images import Source


@dataclass(frozen=True)
class Sampling:
    """The sampling of answers. A temperature of 0 takes the likeliest token each time.

    `tokens`: the longest answer. `top_p`: the smallest set of likeliest tokens with this total probability; `top_k`:
    the most tokens in it, 0 for all. `seed` makes the draw repeatable.
    """

    tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, **drawn}


@dataclass(frozen=True)
class Asked:
    """A rendered conversation with images, opened for an answer."""

    text: str
    images: list[Source]


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    sampling: Sampling = Sampling(),
    *,
    batch: int = 8,
    name: str = "the model",
    streamer: BaseStreamer | None = None,
) -> Iterator[str]:
    """The answers to prompts, in their order, batch by batch.

    Prompts are token ids, or `Asked` by a `seeing.Writer`, which then is the tokenizer. Shorter prompts are padded
    on the left, those of an encoder on the right. `streamer` receives the tokens of a single prompt as they are
    generated. Raises DataError for a prompt that fills all positions of the model (`name` in the error).
    """
    most = positions(model.config)
    for index, ids in enumerate(prompts):
        if not isinstance(ids, Asked) and most is not None and len(ids) > most - (not encodes(model)):
            raise DataError(
                f"text {index + 1} of {len(prompts)} has {len(ids):,} tokens, and {name} takes {most:,}, "
                "including the answer; shorten it"
            )
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    parts = (prompts[start : start + batch] for start in range(0, len(prompts), batch))
    return (answer for part in parts for answer in _answers(model, tokenizer, part, sampling, streamer))


@torch.no_grad()
def _answers(
    model: nn.Module, tokenizer: Any, part: Sequence[Any], sampling: Sampling, streamer: BaseStreamer | None
) -> list[str]:
    pad, device, most = tokenizer.pad_token_id, next(model.parameters()).device, positions(model.config)
    if isinstance(part[0], Asked):
        most = None
        inputs = tokenizer.inputs([prompt.text for prompt in part], [prompt.images for prompt in part], side="left")
    else:
        side, rows = "right" if encodes(model) else "left", [torch.tensor(ids) for ids in part]
        inputs = {"input_ids": pad_sequence(rows, True, pad or 0, side)}
        inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
    read = 0 if encodes(model) else inputs["input_ids"].shape[1]  # the prompt's tokens, which use up positions
    output: Any = model.generate(  # type: ignore[operator]
        **{name: value.to(device) for name, value in inputs.items()},
        max_new_tokens=min(sampling.tokens, most - read) if most is not None else sampling.tokens,
        pad_token_id=pad,
        streamer=streamer,
        **sampling.arguments(),
    )
    return [str(text).strip() for text in tokenizer.batch_decode(output[:, read:], skip_special_tokens=True)]


def encodes(model: Any) -> bool:
    """Whether the model has an encoder for prompts."""
    return bool(getattr(model.config, "is_encoder_decoder", False))
