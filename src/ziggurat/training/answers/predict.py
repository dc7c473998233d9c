"""Answers of a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ziggurat.errors import DataError
from ziggurat.nearest import missing_path
from ziggurat.recipe.schema import SCORED_LENGTH, WRITES

from ..data.encode import Collator, encode_texts, longest, positions
from ..data.examples import text_columns
from ..data.instruct import WITH_LINE_BREAK, alpaca_prompt, column_of
from ..data.readers import read_lines
from ..data.tables import read_table, require_column, texts_of
from ..data.template import asked_ids
from .load import Loaded, load_adapter_model


@dataclass(frozen=True)
class Prediction:
    """One answer: the class, number or text; for classes also the probability of each."""

    text: str
    answer: str | float
    shares: dict[str, float] | None = None

    def to_json(self) -> str:
        values = {"text": self.text, "answer": self.answer}
        return json.dumps(values if self.shares is None else {**values, "shares": self.shares}, ensure_ascii=False)

    def to_line(self, alone: bool = True) -> str:
        """`positive  (positive 0.93, negative 0.07)`; with its text in front where there are several."""
        said = f"{self.answer:.4f}" if isinstance(self.answer, float) else str(self.answer)
        if self.shares is not None:
            ranked = sorted(self.shares.items(), key=lambda item: -item[1])[:5]
            said += "  (" + ", ".join(f"{name} {share:.3f}" for name, share in ranked) + ")"
        return said if alone else f"{said}\t{self.text}"


def predict(
    adapter: str | Path | Loaded,
    texts: Sequence[str],
    second: Sequence[str] | None = None,
    *,
    batch: int = 32,
    max_new_tokens: int = 256,
) -> list[Prediction]:
    """The adapter's answers to texts (or pairs of texts), in order.

    Classes come with softmax probabilities, regression with the number, instruct with greedily generated text.
    Raises DataError when one text is given for two, or two for one.
    """
    loaded = adapter if isinstance(adapter, Loaded) else load_adapter_model(adapter)
    if not texts:
        raise DataError("no text to predict")
    if loaded.head.task in WRITES:
        if second is not None and loaded.run.get("shape") in ("prompt", "text"):
            raise DataError("this adapter was trained on prompts, which have no input beside them: give one text")
        if second is not None and len(second) != len(texts):
            raise DataError(f"{len(texts)} instructions, but {len(second)} inputs")
        return _generate(loaded, texts, second, max_new_tokens)
    if loaded.head.pair and second is None:
        raise DataError(
            f"this adapter compares two texts ('{loaded.recipe.data.text}' and '{loaded.recipe.data.text_pair}'): "
            "give a second one"
        )
    if not loaded.head.pair and second is not None:
        raise DataError("this adapter takes one text, two were given")
    if second is not None and len(second) != len(texts):
        raise DataError(f"{len(texts)} first texts, but {len(second)} second ones")
    return _score(loaded, texts, second, batch)


@torch.no_grad()
def _score(loaded: Loaded, texts: Sequence[str], second: Sequence[str] | None, batch: int) -> list[Prediction]:
    config: Any = loaded.model.config
    length = longest(loaded.tokenizer, config, loaded.recipe.data.max_length or SCORED_LENGTH)
    separate = loaded.head.pooling == "mean" and loaded.head.pair
    columns, _ = encode_texts(texts, second, loaded.tokenizer, length, separate=separate)
    collate, device = Collator(loaded.tokenizer), next(loaded.model.parameters()).device
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    logits = []
    for start in range(0, len(rows), batch):
        inputs = {name: value.to(device) for name, value in collate(rows[start : start + batch]).items()}
        logits.append(loaded.model(**inputs).logits.float().cpu())
    scores = torch.cat(logits)
    if loaded.head.task == "regression":
        return [Prediction(text, float(value)) for text, value in zip(texts, scores[:, 0], strict=True)]
    found = []
    for text, shares in zip(texts, scores.softmax(-1).tolist(), strict=True):
        named = dict(zip(loaded.head.label_names, shares, strict=True))
        found.append(Prediction(text, max(named, key=lambda name: named[name]), named))
    return found


@torch.no_grad()
def _generate(
    loaded: Loaded, texts: Sequence[str], second: Sequence[str] | None, max_new_tokens: int
) -> list[Prediction]:
    tokenizer, model = loaded.tokenizer, loaded.model
    device, most = next(model.parameters()).device, positions(model.config)
    asked = [_asked(loaded, text, second[index] if second is not None else None) for index, text in enumerate(texts)]
    for index, ids in enumerate(asked):
        if most is not None and len(ids) >= most:
            raise DataError(
                f"text {index + 1} of {len(texts)} has {len(ids):,} tokens, and {loaded.recipe.model} takes {most:,}, "
                "those of the answer too; shorten it"
            )
    found = []
    for text, ids in zip(texts, asked, strict=True):
        inputs = torch.tensor([ids], device=device)
        output: Any = model.generate(  # type: ignore[operator]
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(max_new_tokens, most - len(ids)) if most is not None else max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        found.append(Prediction(text, str(answer).strip()))
    return found


def _asked(loaded: Loaded, text: str, context: str | None) -> list[int]:
    """Token ids of one question, in the form that the adapter was trained on."""
    shape = loaded.run.get("shape")
    if shape == "messages":
        content = text if context is None else f"{text}\n\n{context}"
        return asked_ids(loaded.tokenizer, [{"role": "user", "content": content}])
    prompt = text
    if shape == "alpaca":
        prompt = alpaca_prompt(text, context, form=loaded.run.get("prompt_form", WITH_LINE_BREAK))
    return list(loaded.tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]


def _question_columns(loaded: Loaded, table: Any, source: str) -> tuple[str, str | None]:
    """The columns of the questions and of what belongs to them."""
    names = ("instruction", "prompt") if loaded.run.get("shape") == "alpaca" else ("prompt", "instruction")
    found = (column_of(loaded.recipe, name, table, source) for name in names)
    first = next((column for column in found if column is not None), names[0])
    context = column_of(loaded.recipe, "input", table, source)
    return first, context if loaded.run.get("shape") not in ("prompt", "text") else None


def read_texts(file: Path, loaded: Loaded) -> tuple[list[str], list[str] | None]:
    """Texts of a .txt file (one a line) or of a table with the columns the adapter was trained on.

    Raises DataError for a missing file, missing columns, or a .txt file where two texts are needed.
    """
    data = loaded.recipe.data
    if file.suffix.lower() == ".txt":
        if not file.is_file():
            raise DataError(missing_path(file))
        if loaded.head.pair:
            raise DataError(f"this adapter compares two texts: give a table with '{data.text}' and '{data.text_pair}'")
        return read_lines(file), None
    table = read_table(str(file), texts=text_columns(loaded.recipe))
    if loaded.head.task in WRITES:
        first, second = _question_columns(loaded, table, str(file))
    else:
        first, second = data.text, data.text_pair
    for column in (first, second):
        if column is not None:
            require_column(table, column, "--file", str(file))
    texts = texts_of(table, first, str(file))
    if second is None:
        return texts, None
    if loaded.head.task in WRITES:  # an instruction may have no input
        return texts, ["" if text is None else str(text) for text in table[second]]
    return texts, texts_of(table, second, str(file))
