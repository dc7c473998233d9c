"""A handful of validation questions and what the model answers them, before training and after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, Trainer

from ziggurat.recipe.schema import Recipe

from ..data.encode import positions
from ..data.examples import Examples
from ..data.template import question_of
from ..model.generate import Sampling, generate
from .trainers import quiet

if TYPE_CHECKING:
    from datasets import Dataset

#: The longest answer, in tokens; and so many characters of a question are kept.
TOKENS, SHOWN = 64, 600
#: Characters of a text in a command that is shown.
LONGEST = 120


class Answers:
    """The first `train.answers` questions of the validation rows, with greedy answers of the model.

    `rows` holds `question`, `expected`, and `before` and `after` where they were written; it is empty for data that ask
    nothing, and for several processes, which share out the model.
    """

    def __init__(
        self, recipe: Recipe, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, validation: Dataset, alone: bool
    ) -> None:
        self.trainer, self.tokenizer, self.name = trainer, tokenizer, recipe.model
        count = recipe.train.answers if recipe.task == "instruct" and alone else 0
        asked = [question_of(tokenizer, dict(row)) for row in validation.select(range(min(count, len(validation))))]
        self._prompts = [question[0] for question in asked if question is not None]
        self.rows: list[dict[str, str]] = [
            {"question": question[1][:SHOWN], "expected": question[2][:SHOWN]}
            for question in asked
            if question is not None
        ]

    def write(self, when: str) -> None:
        """Let the model answer; `when` is `before` or `after`."""
        if not self._prompts:
            return
        model: Any = self.trainer.model
        most = positions(model.config)
        fits = [place for place, ids in enumerate(self._prompts) if most is None or len(ids) < most]
        training = model.training
        model.eval()
        with quiet():
            prompts = [self._prompts[place] for place in fits]
            written = list(generate(model, self.tokenizer, prompts, Sampling(TOKENS), name=self.name))
        model.train(training)
        for place, answer in zip(fits, written, strict=True):
            self.rows[place][when] = answer


def example_of(examples: Examples) -> list[str]:
    """The texts of a short validation row, in the form in which `ziggurat predict` takes them."""
    table, shape = examples.validation, examples.shape
    rows = [_texts(dict(row), shape) for row in table.select(range(min(50, len(table))))]
    usable = [texts for texts in rows if texts and all(text.strip() for text in texts)]
    texts = min(usable, key=lambda texts: sum(map(len, texts)), default=["..."])
    return [" ".join(text.split())[:LONGEST] for text in texts]


def _texts(row: dict[str, Any], shape: str | None) -> list[str]:
    if "messages" in row:
        asked = [message["content"] for message in json.loads(row["messages"]) if message["role"] == "user"]
        return asked[:1]
    if "prompt" in row:
        instruction = row["prompt"].partition("### Instruction:\n")[2].partition("\n\n###")[0]
        return [instruction if shape == "alpaca" else row["prompt"]]
    if "tokens" in row:
        return [" ".join(row["tokens"])]
    return [row[name] for name in ("text", "text_pair") if name in row]
