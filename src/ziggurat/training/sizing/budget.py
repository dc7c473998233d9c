"""The largest rank within a parameter budget: `method.budget` of a recipe, and `ziggurat plan --budget`."""

import copy
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ziggurat.errors import ConfigError, RecipeError
from ziggurat.recipe.methods import BUDGET, METHODS, method_config
from ziggurat.recipe.schema import Recipe

from ..model.meta import bare_model
from .counts import count

#: The upper limit of the search; it is chosen if even this rank is within the budget (VeRA).
HIGHEST = 4096

_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError)


@dataclass(frozen=True)
class Fit:
    """The rank that meets a budget, and its number of trainable parameters."""

    rank: int
    parameters: int


def settle_budget(recipe: Recipe) -> tuple[Recipe, Fit | None]:
    """The recipe with the rank's fields in place of `method.budget`; unchanged if it has no budget.

    The model is built without weights; nothing but its config is read.

    Raises RecipeError if even the smallest rank is above the budget, or the method refuses the model.
    """
    if BUDGET not in recipe.method:
        return recipe, None
    budget = recipe.method[BUDGET]
    method = {key: value for key, value in recipe.method.items() if key != BUDGET}
    try:
        fit = fit_rank(recipe_model(recipe), method, budget)
    except ConfigError as error:
        raise RecipeError(f"method.budget: {error}") from error
    return recipe.model_copy(update={"method": {**method, **rank_fields(method, fit.rank)}}), fit


def recipe_model(recipe: Recipe) -> nn.Module:
    """The recipe's model on the meta device. Raises RecipeError without a config to build it by."""
    task = "encoder" if not recipe.writes and recipe.head.pooling == "mean" else recipe.task
    try:
        return bare_model(recipe.model, task, revision=recipe.revision, gguf_file=recipe.gguf_file)
    except ConfigError as error:
        raise RecipeError(f"model: {error}") from error


def read_budget(text: str, base: int) -> int:
    """The number of parameters that a text means: "0.1%" of `base`, "300k", "1.2M", "1B" or a whole number.

    Raises:
        ConfigError: it is none of these, or not above 0.
    """
    match = re.fullmatch(r"\s*([\d_,]*\.?\d+)\s*(%|k|m|b)?\s*", text, re.IGNORECASE)
    size = 0
    if match:
        unit = {"%": base / 100, "k": 1e3, "m": 1e6, "b": 1e9}.get((match[2] or "").lower(), 1)
        size = int(float(match[1].replace(",", "").replace("_", "")) * unit)
    if size < 1:
        raise ConfigError(
            f"budget {text!r}: a share of the model's {base:,} parameters such as 0.1%, or a number such as 300k."
        )
    return size


def rank_fields(choice: dict[str, Any], rank: int) -> dict[str, Any]:
    """The fields of `method.*` that give the method of `choice` this rank.

    Raises:
        ConfigError: it has no rank.
    """
    ranks = METHODS[choice["name"]].ranks
    if ranks is None:
        raise ConfigError(f"{choice['name']} has no rank to meet a budget with.")
    return ranks(rank)


def fit_rank(model: nn.Module, choice: dict[str, Any], budget: int, *, build: bool = True) -> Fit:
    """The largest rank of the method `choice` (`method.*` of a recipe) on `model` with at most `budget` parameters.

    The search counts by formula. With `build` the resulting adapter is built and counted, too, and if the method
    refuses it or the counts differ, the search is repeated by building.

    Raises:
        ConfigError: even the smallest rank has more (the error has the number); or the method refuses every rank.
    """

    def by_formula(rank: int) -> int | None:
        try:
            return count(model, method_config({**choice, **rank_fields(choice, rank)}))
        except _REFUSALS:
            return None

    def by_building(rank: int) -> int | None:
        return count_of(model, {**choice, **rank_fields(choice, rank)})

    fit = largest_rank(by_formula, budget)
    if build and (fit is None or by_building(fit.rank) != fit.parameters):
        fit = largest_rank(by_building, budget)
    if fit is not None:
        return fit
    counted = ((rank, by_building(rank) if build else by_formula(rank)) for rank in (1, 2, 3, 4))
    least = next(((rank, number) for rank, number in counted if number is not None), None)
    if least is None:
        count_of(model, {**choice, **rank_fields(choice, 4)}, refuse=True)
        raise ConfigError(f"{choice['name']} refuses every rank up to 4 on this model")
    raise ConfigError(
        f"{budget:,} parameters are too few for {choice['name']}: rank {least[0]} has {least[1]:,} on this model; "
        "raise the budget or adapt fewer modules"
    )


def largest_rank(count: Callable[[int], int | None], budget: int, most: int = HIGHEST) -> Fit | None:
    """The largest rank up to `most` with `count(rank)` at most `budget`; None if even the smallest has more.

    `count` grows with the rank. It returns None for invalid ranks: all above some rank, and fewer than eight in a row
    below it (a pyramid's r / 4 must be whole).
    """

    def nearest(rank: int) -> Fit | None:
        counted = ((r, count(r)) for r in range(rank, max(0, rank - 8), -1))
        return next((Fit(r, number) for r, number in counted if number is not None), None)

    def size(rank: int) -> float:
        fit = nearest(rank)
        return fit.parameters if fit is not None else 0 if rank < 8 else math.inf

    beyond = 8
    while beyond <= most and size(beyond) <= budget:
        beyond *= 2
    beyond = min(beyond, most + 1)
    fit = nearest(bisect_right(range(beyond), budget, key=size) - 1)
    return fit if fit is not None and fit.parameters <= budget else None


def count_of(model: nn.Module, choice: dict[str, Any], *, refuse: bool = False) -> int | None:
    """Trainable parameters of the method's own part on `model`, built and counted once each; None if it refuses.

    With `refuse` its refusal is raised as ConfigError.
    """
    try:
        config = method_config(choice)
        assert config is not None
        if getattr(config, "init_lora_weights", None) == "pissa":
            config.init_lora_weights = True  # the same shapes; weights without values have no decomposition
        with torch.device("meta"), _quiet():
            adapted = get_peft_model(copy.deepcopy(model), config)
    except _REFUSALS as error:
        if refuse:
            raise ConfigError(f"{choice['name']} cannot adapt this model: {error}") from error
        return None
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("ziggurat")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
