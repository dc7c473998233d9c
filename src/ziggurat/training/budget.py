"""`method.budget`: the largest rank whose adapter has no more trainable numbers than the budget."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ziggurat.errors import RecipeError

from .embedded import model_path
from .methods import BUDGET, METHODS, method_config
from .schema import Recipe

#: No adapter of this rank is worth training; where even this one is below the budget (VeRA), it is what is picked.
HIGHEST = 4096


@dataclass(frozen=True)
class Fit:
    """The rank that meets a budget, and how many trainable numbers it makes."""

    rank: int
    parameters: int


def settle_budget(recipe: Recipe) -> tuple[Recipe, Fit | None]:
    """The recipe with the rank's fields in place of `method.budget`; itself where there is none.

    The model is built without weights; nothing but its config is read.

    Raises RecipeError if even the smallest rank is above the budget, or the method refuses the model.
    """
    if BUDGET not in recipe.method:
        return recipe, None
    budget = recipe.method[BUDGET]
    rest = {key: value for key, value in recipe.method.items() if key != BUDGET}
    fit = fit_rank(bare_model(recipe), rest, budget)
    ranks = METHODS[rest["name"]].ranks
    assert ranks is not None
    return recipe.model_copy(update={"method": {**rest, **ranks(fit.rank)}}), fit


def bare_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with its shapes but no numbers, on the meta device. Raises RecipeError without a config."""
    where: dict[str, Any] = {"revision": recipe.revision or "main"}
    if recipe.gguf_file is not None:
        where["gguf_file"] = recipe.gguf_file
    try:
        config = AutoConfig.from_pretrained(model_path(recipe.model), **where)
        if recipe.task == "instruct":
            kind: Any = AutoModelForCausalLM
        else:
            kind = AutoModel if recipe.head.pooling == "mean" else AutoModelForSequenceClassification
        with torch.device("meta"):
            return kind.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"model: '{recipe.model}' has no config to count by: {str(error).splitlines()[0]}") from error


def fit_rank(model: nn.Module, choice: dict[str, Any], budget: int) -> Fit:
    """The largest rank of the method `choice` on `model` with at most `budget` trainable numbers, found by bisection.

    Raises RecipeError that says what the smallest rank has.
    """
    ranks = METHODS[choice["name"]].ranks
    assert ranks is not None
    counts: dict[int, int | None] = {}

    def fits(rank: int) -> bool:
        if rank not in counts:
            counts[rank] = count_of(model, {**choice, **ranks(rank)})
        found = counts[rank]
        return found is not None and found <= budget

    low = next((rank for rank in (1, 2, 3, 4) if fits(rank)), None)
    if low is None:
        least = next(((rank, count) for rank, count in counts.items() if count is not None), None)
        if least is None:
            count_of(model, {**choice, **ranks(4)}, refuse=True)
            raise RecipeError(f"method.budget: {choice['name']} refuses every rank up to 4 on this model")
        raise RecipeError(
            f"method.budget: {budget:,} numbers are too few for {choice['name']}: rank {least[0]} has {least[1]:,} on "
            "this model; raise the budget or adapt fewer modules"
        )
    high = low
    while high < HIGHEST and fits(min(2 * high, HIGHEST)):
        high = min(2 * high, HIGHEST)
    low, beyond = high, min(2 * high, HIGHEST + 1)
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if fits(middle) else (low, middle)
    found = counts[low]
    assert found is not None
    return Fit(low, found)


def count_of(model: nn.Module, choice: dict[str, Any], *, refuse: bool = False) -> int | None:
    """Trainable numbers of the method's own part on `model`, each counted once; None where the method refuses.

    With `refuse` its refusal is raised as RecipeError.
    """
    try:
        config = method_config(choice)
        assert config is not None
        if getattr(config, "init_lora_weights", None) == "pissa":
            config.init_lora_weights = True  # the same shapes without a singular value decomposition of nothing
        with _quiet():
            adapted = get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if refuse:
            raise RecipeError(f"method: {choice['name']} cannot adapt this model: {error}") from error
        return None
    unique = {id(parameter): parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad}
    return sum(unique.values())


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("ziggurat")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
