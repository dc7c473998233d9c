"""Ranks and groups by measurement: a short probe run at one high rank for every tier, then an allocation."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ziggurat.analysis import Collected, collect, sharing
from ziggurat.errors import ConfigError
from ziggurat.methods.msplora.config import MSPLoraConfig

from . import allocate
from .gradients import gradients_of, lay_out

#: The criterion without a probe run.
GRADIENTS = "gradients"
#: This factor over independent gradients is more than chance and a few outliers.
WORTH = 1.5


class SensitivityCallback(TrainerCallback):
    """Averages `allocate.sensitivities` over the steps of a run."""

    def __init__(self, by_role: bool = False) -> None:
        self.by_role = by_role
        self.gains: dict[str, np.ndarray] = {}
        self.steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        for tier, values in allocate.sensitivities(kwargs["model"], by_role=self.by_role).items():
            old = self.gains.get(tier, np.zeros(len(values)))
            self.gains[tier] = old + (values - old) / self.steps


@dataclass(frozen=True)
class Suggestion:
    """`ranks` by tier, coarse to fine, or by `<tier>:<role>`; `group_starts` of the mid tier, None if unknown.

    `spent` of `budget` parameters; the choice is based on `gains` (or widths) by tier.
    """

    ranks: dict[str, int]
    group_starts: list[int] | None
    budget: int
    spent: int
    criterion: str
    gains: dict[str, list[float]]
    notes: list[str]

    @property
    def rank_pattern(self) -> dict[str, list[int]] | None:
        """Role -> ranks of its tiers, as `MSPLoraConfig` takes them; None if all roles of a tier have one rank."""
        by_role: dict[str, list[int]] = {}
        for key, rank in self.ranks.items():
            role = key.partition(":")[2]
            if role:
                by_role.setdefault(role, []).append(rank)
        return by_role or None


def suggestion(
    probe: Collected,
    budget: int,
    criterion: str = "energy",
    *,
    groups: int = 3,
    sensitivity: dict[str, np.ndarray] | None = None,
    by_role: bool = False,
) -> Suggestion:
    """The suggestion of a probe of MSPLoRA, all tiers at one high rank, for a budget of parameters.

    `by_role`: each role has ranks of its own, and `sensitivity`, if given, was recorded so.

    Raises:
        ConfigError: the probe isn't one of MSPLoRA or was never trained, or the budget is too small.
    """
    if probe.method != "msplora":
        raise ConfigError(f"{probe.source} is an adapter of {probe.method}: a probe is one of msplora.")
    if criterion not in allocate.CRITERIA:
        raise ConfigError(f"criterion {criterion!r}: one of {', '.join(allocate.CRITERIA)}.")
    if all(c.zero or not c.finite for c in probe.components):
        raise ConfigError(f"{probe.source} holds nothing but zeros or NaN: train the probe first, or longer.")
    cost = allocate.costs(probe, by_role)
    most = max(c.rank for c in probe.components if c.stored)
    if criterion in ("energy", "sensitivity"):
        gains = allocate.energies(probe, by_role) if criterion == "energy" else dict(sensitivity or {})
        if set(gains) != set(cost):
            raise ConfigError(
                "criterion 'sensitivity' needs the gradients of a probe run: record them while it trains."
            )
        ranks = allocate.by_gain(gains, cost, budget)
        shown = {tier: values.tolist() for tier, values in gains.items()}
    else:
        width = allocate.widths(probe, criterion, by_role)
        ranks = allocate.by_width(width, cost, budget, most)
        shown = {tier: [value] for tier, value in width.items()}
    notes, starts = [], None
    depths = set(probe.layers.values())
    if len(depths) != 1:
        notes.append(f"stacks of {' and '.join(map(str, sorted(depths)))} layers: their groups stay equal parts")
    elif probe.by_layer == "update":
        notes.append("no private tier, so no layers to compare: the groups stay equal parts")
    elif (depth := depths.pop()) >= 2 * groups:
        starts = allocate.boundaries(allocate.layer_distance(probe), groups, shortest=max(1, depth // (2 * groups)))
    for tier, rank in ranks.items():
        if rank == most:
            notes.append(f"tier {tier} takes all {most} ranks of the probe: a probe of higher rank may give it more")
    spent = sum(cost[tier] * rank for tier, rank in ranks.items())
    return Suggestion(ranks, starts, budget, spent, criterion, shown, notes)


def by_gradients(items: Sequence[sharing.Item], budget: int, groups: int = 3, by_role: bool = False) -> Suggestion:
    """The suggestion of the gradients of a model's data before training for a budget of parameters, without a probe.

    Ranks go to the tiers with the most of the gradients' energy per parameter (`gradients.lay_out`). Notes compare the
    common part with that of independent gradients.

    Raises:
        ConfigError: the budget is too small.
    """
    ranks, gains, spent = lay_out(items, budget, groups, by_role)
    lines = [line for line in sharing.shared(items) if line.over in ("depth", "group")]
    notes = [f"gradients, {sharing.sentence(line)}" for line in lines]
    if lines and all(line.share < WORTH * line.independent for line in lines):
        notes.append(
            "the gradients have hardly more in common than independent ones: a private pair for each layer "
            "(method.name: lora) holds more of them with as many parameters"
        )
    return Suggestion(ranks, None, budget, spent, GRADIENTS, gains, notes)


def suggest(
    source: str | Path,
    words: Sequence[str] = (),
    *,
    budget: str | None = None,
    criterion: str = "energy",
    probe_rank: int = 16,
    probe_steps: int = 200,
    by_role: bool = False,
    console: Any = None,
) -> tuple[Suggestion, str]:
    """Probe a recipe's model on its data, and return the suggestion and the recipe's text with it.

    `budget`: "0.1%" of the model or "300k"; without one the recipe's `method.budget`, or what its pyramid has.

    Raises:
        ConfigError: the recipe's method isn't msplora, the budget is too small, or the probe learned nothing.
        RecipeError, MissingExtraError: as for `ziggurat train`.
    """
    from ziggurat.recipe.needs import check as check_needs
    from ziggurat.recipe.recipe import load_recipe, to_yaml
    from ziggurat.training.loop.run import train

    recipe = load_recipe(source, words)
    check_needs(recipe, "ziggurat suggest")
    if recipe.method["name"] != "msplora":
        raise ConfigError(f"suggest lays out a pyramid: method.name must be msplora, not {recipe.method['name']}.")
    # Mistakes are reported before the probe run.
    criteria = (*allocate.CRITERIA, GRADIENTS)
    if criterion not in criteria:
        raise ConfigError(f"criterion {criterion!r}: one of {', '.join(criteria)}.")
    total = _budget(recipe, budget)
    groups = recipe.method.get("num_groups") or 3
    dropped = [f"{key}=" for key in _SHAPE if key != "method.ranks" and key.removeprefix("method.") in recipe.method]
    if criterion == GRADIENTS:
        suggested = by_gradients(gradients_of(source, words), total, groups, by_role)
    else:
        sensitivity = SensitivityCallback(by_role)
        with tempfile.TemporaryDirectory() as folder:
            probe = [*dropped, f"method.ranks={[probe_rank] * 3}", f"train.max_steps={probe_steps}", *_QUICK]
            probe.append(f"output={folder}/probe")
            quick = load_recipe(source, [*_without(words, [*_SHAPE, *map(_key, probe)]), *probe])
            result = train(quick, console=console, callbacks=[sensitivity])
            collected = collect(result.folder)
        gains = sensitivity.gains
        suggested = suggestion(collected, total, criterion, groups=groups, sensitivity=gains, by_role=by_role)
    if (pattern := suggested.rank_pattern) is not None and len(suggested.ranks) > sum(map(len, pattern.values())):
        suggested.notes.append("linear layers outside the stacks have no role: they get the ranks of the first role")
    if "tiers" in recipe.method:
        old = f"the recipe's {len(recipe.method['tiers'])} tiers of method.tiers"
        suggested.notes.append(f"{old} give way to the three that are suggested: global, mid and layer")
    final = [*_suggested(recipe, suggested), *(word for word in dropped if _key(word) not in _SUGGESTED)]
    text = to_yaml(load_recipe(source, [*_without(words, [*_SHAPE, *map(_key, final)]), *final]))
    # Runs of one name share a folder: the suggested one is called after its file.
    lines = (line for line in text.splitlines(keepends=True) if not line.startswith(("name:", "output:")))
    return suggested, "".join(lines)


#: Settings of a quick probe run.
_QUICK = ("train.save=never", "train.evaluate=never", "train.evaluate_before=false", "train.best=false")
_QUICK += ("train.report_to=",)
_SUGGESTED = ("method.group_starts", "method.rank_pattern")


def _key(word: str) -> str:
    return word.partition("=")[0]


def _without(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [word for word in words if _key(word) not in keys]


def _suggested(recipe: Any, suggested: Suggestion) -> Iterator[str]:
    """The suggestion as `key=value` words for the recipe."""
    from ziggurat.recipe.methods import method_config
    from ziggurat.training.sizing.budget import settle_budget

    pattern = suggested.rank_pattern
    ranks = list(suggested.ranks.values()) if pattern is None else next(iter(pattern.values()))
    yield f"method.ranks={ranks}"
    if pattern is not None or "rank_pattern" in recipe.method:
        yield f"method.rank_pattern={json.dumps(pattern) if pattern else ''}"
    if recipe.method.get("even_scales"):
        # The scale is lora_alpha over the first rank, which changes: lora_alpha is adjusted to keep the recipe's scale.
        config = method_config(settle_budget(recipe)[0].method)
        assert isinstance(config, MSPLoraConfig)
        first = config.pyramid()[0]
        yield f"method.lora_alpha={replace(first, r=ranks[0]).scaled(first.scale).lora_alpha}"
    if suggested.group_starts is not None:
        yield f"method.group_starts={suggested.group_starts}"
        yield "method.num_groups="


#: The keys that the suggestion sets.
_SHAPE = tuple(f"method.{name}" for name in ("ranks", "group_starts", "tiers", "rank_pattern", "budget"))


def _budget(recipe: Any, budget: str | None) -> int:
    """The budget as a number. Raises ConfigError if it isn't one, or is below one rank for each tier."""
    from ziggurat.recipe.methods import method_config
    from ziggurat.training.sizing.budget import read_budget, recipe_model
    from ziggurat.training.sizing.counts import count

    bare = recipe_model(recipe)
    if budget is not None:
        total = read_budget(budget, sum(p.numel() for p in bare.parameters()))
    elif "budget" in recipe.method:
        total = int(recipe.method["budget"])
    else:
        return count(bare, method_config(recipe.method))
    ranked = ("r", "ranks", "tiers", "rank_pattern", "group_starts", "budget")
    shape = {name: value for name, value in recipe.method.items() if name not in ranked}
    least = count(bare, method_config({**shape, "ranks": [1, 1, 1]}))
    allocate.check_budget(least, total)
    return total
