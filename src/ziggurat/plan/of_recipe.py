"""The plan of a recipe: its method, budget, labels and data for a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ziggurat.errors import ConfigError

from .planner import DEFAULT, Plan, plan


def plan_recipe(
    model: str | Path,
    recipe: Any = None,
    choice: Mapping[str, Any] | None = None,
    *,
    budget: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    measure_memory: bool = True,
    tenants: int | None = None,
) -> Plan:
    """The plan of a recipe's method, or of `choice` (method.* as in a recipe), for `model`, by its config.

    With a recipe also by the names of its weights and the labels of the data, if they are local; otherwise `notes` has
    the assumptions.

    `budget` ("0.1%" of the model, "300k"): the largest rank within it, instead of the recipe's rank; a recipe's own
    `method.budget` is met as in `ziggurat train`.

    Raises:
        ConfigError: no such model, a method without an adapter, or a budget below the smallest one.
        RecipeError: `choice` isn't one of a method.
    """
    from ziggurat.recipe.methods import BUDGET, METHODS, method_config
    from ziggurat.recipe.schema import SCORED_LENGTH
    from ziggurat.training.data.encode import longest
    from ziggurat.training.model.meta import bare_model
    from ziggurat.training.model.meta_base import BareBase, bare_base
    from ziggurat.training.sizing.budget import read_budget

    chosen = dict(choice or (recipe.method if recipe is not None else DEFAULT))
    method = METHODS[chosen["name"]]
    if method.config is None:
        raise ConfigError(f"method {chosen['name']} trains weights of the model itself; there is no adapter to plan.")
    base = bare_base(recipe, model) if recipe is not None else BareBase(bare_model(model), [], False, [])
    pays = chosen.pop(BUDGET, None)
    if budget is not None:
        pays = read_budget(budget, sum(p.numel() for p in base.model.parameters()))
    if pays is not None:
        chosen = _paid(base.model, chosen, pays)
    planned = plan(
        base.model,
        method_config(chosen) if recipe is None else _config_of(recipe, base, chosen),
        name=str(model),
        method=chosen["name"],
        task=recipe.task if recipe is not None else None,
        batch=batch or (recipe.train.batch if recipe is not None else 16),
        length=length or longest(None, base.model.config, (recipe and recipe.data.max_length) or SCORED_LENGTH),
        measure_memory=measure_memory,
        pair=base.pair,
        checkpointing=recipe is not None and recipe.train.gradient_checkpointing,
        four_bits=method.four_bits,
        tenants=tenants,
    )
    precision = recipe.train.precision if measure_memory and recipe is not None else "fp32"
    return replace(planned, notes=[*base.notes, *planned.notes, *_precision(precision)])


def _config_of(recipe: Any, base: Any, choice: Mapping[str, Any]) -> Any:
    """The config of a recipe's method as `ziggurat train` makes it for this base."""
    from ziggurat.recipe.methods import method_config
    from ziggurat.training.model.adapt import beside, leave_out, other_towers
    from ziggurat.training.model.base import sees_images

    seeing = recipe.writes and sees_images(base.model.config)
    config: Any = method_config(dict(choice), **beside(recipe, base.head, seeing))
    if seeing:
        leave_out(config, other_towers(base.model, recipe.tower))
    return config


def _precision(precision: str) -> list[str]:
    note = (
        f"train.precision {precision}: the activations are counted in the dtype of the weights; autocast keeps about "
        "half of them, and a copy of the weights that it casts"
    )
    return [note] * (precision != "fp32")


def _paid(model: nn.Module, choice: dict[str, Any], budget: int) -> dict[str, Any]:
    """The choice with the largest rank that `budget` parameters pay for."""
    from ziggurat.training.sizing.budget import fit_rank, rank_fields

    choice = {key: value for key, value in choice.items() if key not in ("ranks", *rank_fields(choice, 8))}
    return choice | rank_fields(choice, fit_rank(model, choice, budget).rank)
