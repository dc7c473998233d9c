"""TRL's trainers of preferences, on rows that are tokenized and counted already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ziggurat.errors import RecipeError

from ..folder.checkpoints import Resumable
from .arguments import Setup

if TYPE_CHECKING:
    from datasets import Dataset


def preference_trainer(setup: Setup, arguments: dict[str, Any], train: Dataset, validation: Dataset) -> Trainer:
    """DPO (Rafailov et al. 2023) or KTO (Ethayarajh et al. 2024) by TRL.

    L_DPO = -ln sigmoid(r(x, y_w) - r(x, y_l)) with the reward r(x, y) = beta ln p(y | x) / p_ref(y | x); p_ref is the
    model before training. Its probabilities are computed once, beforehand: no second copy is held while training.
    """
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    recipe = setup.recipe
    arguments = arguments | {"precompute_ref_log_probs": True}
    if recipe.task == "kto":
        if recipe.train.batch < 2 or recipe.train.eval_batch < 2:
            raise RecipeError("train.batch: kto compares the rows of a batch; at least 2 (train.eval_batch, too)")
        # Each row is paired with the answer before it in its batch, so batches stay as they are cut here.
        arguments |= {"train_sampling_strategy": "sequential"}
    kind, config = (DPOTrainer, DPOConfig) if recipe.task == "dpo" else (KTOTrainer, KTOConfig)
    trainer = _tokenized(kind)(
        model=setup.model,
        args=config(**arguments),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=setup.base.tokenizer,
        callbacks=setup.callbacks,
    )
    # TRL keeps a copy of the adapter to compute the reference by, which nothing asks for any more.
    if "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")  # type: ignore[union-attr, operator]
    return trainer


def _tokenized(base: type) -> type:
    class TokenizedTrainer(Resumable, base):
        """TRL's trainer `base` without its own tokenization, which drops rows unseen."""

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            if not getattr(self, "calculate_KL", False):
                return dataset
            # KTO's reference point is estimated from each prompt with the answer of the row before it in the batch.
            return dataset.map(
                lambda rows: {"KL_completion_ids": [rows["completion_ids"][-1], *rows["completion_ids"][:-1]]},
                batched=True,
                batch_size=args.per_device_train_batch_size,
            )

    return TokenizedTrainer
