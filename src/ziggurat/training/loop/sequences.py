"""Models with an encoder and a decoder: their Trainer, and the scores of their texts."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from ..data.sources import encode_sources
from .arguments import Setup, Task
from .exact import ExactSteps, TokenLoss

#: Words of any script; single characters of Chinese and Japanese, which don't separate words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_ROUGE = ("rouge1", "rouge2", "rougeL")


class Words:
    """The tokenizer of ROUGE. rouge_score's own knows the letters a to z alone, and would score other scripts 0."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def text_scores(written: Sequence[str], targets: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of each text against its target, in per cent.

    F1 of ROUGE-1, ROUGE-2 and ROUGE-L [Lin 2004] on lower-case words without stemming, and equality except for
    surrounding blanks.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), tokenizer=Words())
    rows = [scorer.score(target, text) for text, target in zip(written, targets, strict=True)]
    scores = {name: np.array([100.0 * row[name].fmeasure for row in rows]) for name in _ROUGE}
    same = [100.0 * (text.strip() == target.strip()) for text, target in zip(written, targets, strict=True)]
    return {**scores, "exact_match": np.array(same)}


class SequenceTrainer(TokenLoss, ExactSteps, Trainer):
    """Scores the likeliest text of each validation source, as in `ziggurat predict`, and its target's loss."""

    #: The maximum number of generated tokens.
    most: int

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.compute_loss_context_manager():
            written = self.accelerator.unwrap_model(model).generate(
                **prompt, do_sample=False, max_new_tokens=self.most, synced_gpus=self.args.world_size > 1
            )
        return loss, written, inputs["labels"]


def transforming(setup: Setup) -> Task:
    """The Trainer of seq2seq, and notes. Raises DataError."""
    tokenizer = setup.base.tokenizer
    train, validation, most, notes = encode_sources(setup.recipe, tokenizer, setup.base.model.config, setup.examples)

    def compute(result: Any) -> dict[str, float]:
        # Shorter rows are padded with -100, which isn't a token.
        filled: Any = (np.where(ids < 0, tokenizer.pad_token_id, ids) for ids in (result.predictions, result.label_ids))
        texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in filled)
        return {name: float(scores.mean()) for name, scores in text_scores(*texts).items()}

    arguments = TrainingArguments(**setup.arguments, label_names=["labels"], remove_unused_columns=False)
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=setup.multiple)
    how = {"data_collator": collator, "compute_metrics": compute}
    trainer = setup.trainer(SequenceTrainer, arguments, (train, validation), **how)
    trainer.most = most
    return Task(trainer, notes)
