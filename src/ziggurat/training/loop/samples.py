"""Some validation questions with the model's answers before and after training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ziggurat.host.bars import quiet
from ziggurat.recipe.schema import Recipe

from ..data.chat import IMAGE
from ..data.encode import positions
from ..data.examples import Examples
from ..data.sources import source_ids
from ..model.base import Base
from ..model.generate import Sampling, generate
from ..model.seeing import question_of, writer_of

if TYPE_CHECKING:
    from datasets import Dataset

#: The longest answer, in tokens; and the most characters of a question that are kept.
TOKENS, SHOWN = 64, 600
#: The most characters of a text in a command that is shown.
LONGEST = 120


class Answers:
    """The first `train.answers` questions of the validation rows, with the model's greedy answers.

    `rows` holds `question`, `expected`, and `before` and `after` once they are written; it is empty for data without
    questions, and for several processes, which may shard the model.
    """

    def __init__(self, recipe: Recipe, trainer: Trainer, base: Base, validation: Dataset, alone: bool) -> None:
        self.trainer, self.base, self.name = trainer, base, recipe.model
        count = recipe.train.answers if recipe.task in ("instruct", "seq2seq") and alone else 0
        rows = validation.select(range(min(count, len(validation))))
        self._writer = writer_of(base.tokenizer, base.processor)
        questions = [_question(recipe, self._writer, dict(row)) for row in rows]
        self._prompts = [question[0] for question in questions if question is not None]
        self.rows: list[dict[str, str]] = [
            {"question": question[1][:SHOWN], "expected": question[2][:SHOWN]}
            for question in questions
            if question is not None
        ]

    def write(self, when: str) -> None:
        """Let the model answer; `when` is `before` or `after`."""
        if not self._prompts:
            return
        model: Any = self.trainer.model
        most = positions(model.config) if self.base.processor is None else None
        fits = [place for place, ids in enumerate(self._prompts) if most is None or len(ids) < most]
        training = model.training
        model.eval()
        with quiet():
            prompts = [self._prompts[place] for place in fits]
            written = list(generate(model, self._writer, prompts, Sampling(TOKENS), name=self.name))
        model.train(training)
        for place, answer in zip(fits, written, strict=True):
            self.rows[place][when] = answer


def _question(recipe: Recipe, writer: Any, row: dict[str, Any]) -> tuple[Any, str, str] | None:
    if "source" in row:
        return source_ids(recipe, writer, [row["source"]])[0], row["source"], row["target"]
    return question_of(writer, row)


def example_of(examples: Examples, rated: bool = False) -> tuple[list[str], list[str]]:
    """The texts of a short validation row, and the files of its images, as arguments of `ziggurat predict`.

    `rated`: with the answer, for a model that rates answers.
    """
    table, shape = examples.validation, examples.shape
    rows = [dict(row) for row in table.select(range(min(50, len(table))))]
    candidates = [(_texts(row, shape, rated), [image["path"] for image in row.get("images") or []]) for row in rows]
    usable = [
        (texts, paths) for texts, paths in candidates if texts and all(text.strip() for text in texts) and all(paths)
    ]
    texts, paths = min(usable, key=lambda pair: (not pair[1], sum(map(len, pair[0]))), default=(["..."], []))
    return [" ".join(text.split())[:LONGEST] for text in texts], paths


def _texts(row: dict[str, Any], shape: str | None, rated: bool) -> list[str]:
    if rated:
        talk = json.loads(row["messages"])[-2:] if "messages" in row else []
        return [message["content"] for message in talk] or [row["prompt"], row["completion"]]
    if "messages" in row:
        questions = [message["content"] for message in json.loads(row["messages"]) if message["role"] == "user"]
        return [text.replace(IMAGE, "") for text in questions[:1]]
    if "prompt" in row:
        instruction = row["prompt"].partition("### Instruction:\n")[2].partition("\n\n###")[0]
        return [instruction if shape == "alpaca" else row["prompt"]]
    if "tokens" in row:
        return [" ".join(row["tokens"])]
    return [row[name] for name in ("text", "text_pair", "source") if name in row]
