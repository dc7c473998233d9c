"""TRL's preference trainers, on rows that are tokenized already."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import Trainer

from ziggurat.errors import RecipeError

from ..folder.checkpoints import Resumable
from .arguments import Setup

if TYPE_CHECKING:
    from datasets import Dataset

#: A placeholder for TRL's trainers, which importing this file must not load.
_TRL: Any = object
#: Task -> the module of TRL, and the first part of the names of its trainer and config there.
_TRAINERS = {
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "reward": ("trl", "Reward"),
}
_ANSWERS = ("chosen", "rejected")


def preference_trainer(setup: Setup, train: Dataset, validation: Dataset, length: int) -> Trainer:
    """The trainer of TRL. DPO (Rafailov et al. 2023) and KTO (Ethayarajh et al. 2024) learn a policy:

    L_DPO = -ln sigmoid(r(x, y_w) - r(x, y_l)) with the reward r(x, y) = beta ln p(y | x) / p_ref(y | x); p_ref is the
    model before training. Its probabilities are computed once, beforehand: training needs no second copy of the model.

    ORPO (Hong et al. 2024) needs no reference: L_ORPO = L_NLL(y_w) - beta ln sigmoid(ln odds(y_w | x) / odds(y_l | x)).
    A reward model has the same loss as DPO with the score of its head as r(x, y) (Bradley & Terry 1952).
    """
    recipe = setup.recipe
    module, name = _TRAINERS[recipe.task]
    kind, config = trl_classes(recipe.task, module, f"{name}Trainer", f"{name}Config")
    arguments = setup.arguments | {"max_length": length, "beta": recipe.train.beta}
    if recipe.task in ("dpo", "kto"):
        arguments |= {"precompute_ref_log_probs": True}
    else:  # there is no reference model, so the recipe's dropout applies
        arguments |= {"disable_dropout": False}
    if recipe.task == "kto":
        if recipe.train.batch < 2 or recipe.train.eval_batch < 2:
            raise RecipeError("train.batch: kto compares the rows of a batch; at least 2 (train.eval_batch, too)")
        # Each row is paired with the answer before it in its batch, so batches stay as they are cut here.
        arguments |= {"train_sampling_strategy": "sequential"}
    if recipe.task == "reward":
        del arguments["beta"]
        train, validation = (table.map(lambda row: _whole(row, length)) for table in (train, validation))
    mixed = {"kto": Tokenized, "orpo": TokenizedORPO}.get(recipe.task, TokenizedPairs)
    kind = type(kind.__name__, (mixed, kind), {})
    return setup.trainer(kind, config(**arguments), (train, validation), processing_class=setup.base.tokenizer)


def trl_classes(task: str, module: str, *names: str) -> list[Any]:
    """Classes of TRL. Raises RecipeError where its version has none of that name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run has a note about experimental trainers
            home = import_module(module)
            return [getattr(home, name) for name in names]
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"task: {task} needs {names[0]} of {module}, and TRL {version('trl')} has none") from error


def _whole(row: dict[str, Any], length: int) -> dict[str, list[int]]:
    """Both answers after the prompt, of at most `length` tokens."""
    return {f"{name}_ids": (row["prompt_ids"] + row[f"{name}_ids"])[:length] for name in _ANSWERS}


class Tokenized(Resumable, _TRL):
    """Mixed into a trainer of TRL: replaces its tokenization, which drops rows silently."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not getattr(self, "calculate_KL", False):
            return dataset
        # KTO's reference point is estimated from each prompt with the answer of the row before it in the batch.
        return dataset.map(
            lambda rows: {"KL_completion_ids": [rows["completion_ids"][-1], *rows["completion_ids"][:-1]]},
            batched=True,
            batch_size=args.per_device_train_batch_size,
        )


class TokenizedPairs(Tokenized):
    """Scores are means over pairs. TRL's are means over batches, of which the last may have a single pair."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = self.__dict__.setdefault("_sizes", [])
        sizes.append(next(len(value) for value in inputs.values() if isinstance(value, Tensor)))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        sizes = self.__dict__.pop("_sizes", [])
        stored = self._stored_metrics if hasattr(self, "_stored_metrics") else self._metrics
        for values in stored["eval"].values():
            if len(values) == len(sizes):
                values[:] = [float(np.average(values, weights=sizes))]
        for of_mode in stored.values():  # the reward trainer's metrics get its neighbours' names
            for name, ours in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
                if name in of_mode:
                    of_mode[ours] = of_mode.pop(name)
        super().log(logs, *args, **kwargs)


class TokenizedORPO(TokenizedPairs):
    """The columns that TRL's ORPOTrainer makes of texts, made of token ids."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        columns, start = {}, len(feature["prompt_ids"])
        for name, ids in _whole(feature, self.max_length).items():
            answer = name.removesuffix("_ids")
            columns[f"{answer}_input_ids"], columns[f"{answer}_attention_mask"] = ids, [1] * len(ids)
            columns[f"{answer}_labels"] = [-100] * start + ids[start:]
        return columns
