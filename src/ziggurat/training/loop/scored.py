"""The Trainer of tasks with labels or tags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainingArguments

from ziggurat.errors import RecipeError
from ziggurat.recipe.schema import SCORED_LENGTH

from ..data.encode import Collator, encode, longest, spread
from ..model.base import is_in
from . import metrics
from .alike import same_answer, warning
from .arguments import Setup, Task
from .exact import ExactTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class HeadLrTrainer(ExactTrainer):
    """Trainer with an optional separate learning rate of the head."""

    head: tuple[str, ...] = ()
    head_lr: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.head_lr is not None and len(optimizer.param_groups) <= 2:
            self._split_head(optimizer)
        return optimizer

    def _split_head(self, optimizer: torch.optim.Optimizer) -> None:
        # New groups are split before the scheduler reads their rates; a resumed run loads its state in the same order.
        assert self.model is not None
        in_head = {id(parameter) for name, parameter in self.model.named_parameters() if is_in(name, self.head)}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in in_head]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_head]
                options = {key: value for key, value in group.items() if key not in ("params", "lr")}
                optimizer.add_param_group({**options, "params": moved, "lr": self.head_lr})


def scoring(setup: Setup) -> Task:
    """The Trainer of a scored task. Raises RecipeError."""
    recipe, base, examples = setup.recipe, setup.base, setup.examples
    if recipe.task == "tokens" and not base.tokenizer.is_fast:
        raise RecipeError(f"model: the tokenizer of {recipe.model} doesn't tell the word of a token; take another")
    limit = recipe.data.max_length or SCORED_LENGTH
    length = longest(base.tokenizer, base.model.config, limit)
    notes = [f"data.max_length {limit} lowered to {length}, all this model can take"] if length < limit else []
    separate = recipe.head.pooling == "mean" and recipe.data.text_pair is not None
    parts: list[Dataset] = []
    for table, word in examples.parts:
        encoded, lengths = encode(table, base.tokenizer, length, separate=separate)
        parts.append(encoded)
        if word == "training":
            notes.append(spread(lengths, "training texts"))
        if cut := sum(tokens > length for tokens in lengths):
            notes.append(f"{cut} of {len(table)} {word} texts are longer than {length} tokens and were cut")
    classes = len(examples.label_names)
    guess = metrics.guessing(recipe, list(examples.train["label"]), list(examples.validation["label"]), classes)
    last: dict[str, Any] = {}

    def compute(result: Any) -> dict[str, float]:
        last.update(outputs=metrics.outputs_of(result.predictions), labels=np.asarray(result.label_ids))
        if recipe.task == "tokens":
            from .entities import scores_of

            return scores_of(examples.label_names, last["outputs"], last["labels"])
        return metrics.score(recipe, last["outputs"], last["labels"], classes)

    def outputs() -> np.ndarray:
        if not last:  # a resumed run whose last scores are in its checkpoint
            trainer.evaluate()
        return last["outputs"]

    def judged() -> dict[str, Any]:
        from scipy.special import softmax

        from .classes import by_class, shown_texts

        scores = outputs().astype(np.float64)
        # Rows of similar length may have been scored together.
        sampler: Any = trainer._get_eval_sampler(parts[1])  # type: ignore[arg-type]
        order = list(sampler) if sampler is not None else range(len(parts[1]))
        texts, shares = shown_texts(examples.validation), softmax(scores, axis=-1)
        return by_class(shares, last["labels"], examples.label_names, [texts[row] for row in order])

    def alike() -> str | None:
        answer = same_answer(recipe, outputs(), last["labels"], examples.label_names)
        return None if answer is None else warning(recipe, answer, last["labels"])

    arguments = TrainingArguments(**setup.arguments, label_names=["labels"], remove_unused_columns=False)
    how = {"data_collator": Collator(base.tokenizer, setup.multiple), "compute_metrics": compute}
    trainer = setup.trainer(HeadLrTrainer, arguments, parts, **how)
    if recipe.train.class_weights is not None:
        from .classes import weights_of

        trainer.class_weights = weights_of(recipe, examples.train["label"], examples.label_names)
    trainer.head, trainer.head_lr = tuple(base.head), recipe.head.lr
    return Task(trainer, notes, guess, judged if recipe.task == "classification" else dict, alike)
