"""The gradients of a recipe's data before training, and a pyramid that fits them."""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ziggurat.analysis.sharing import GROUPS, Item, gradients
from ziggurat.errors import RecipeError
from ziggurat.recipe.tasks import REWARDED

from .allocate import check_budget

#: The number of batches.
BATCHES = 16
#: The highest rank of a tier.
MOST_RANK = 256


def gradients_of(source: str | Path, words: Sequence[str] = (), batches: int = BATCHES) -> list[Item]:
    """The gradients of a recipe's loss over its first `batches` training batches, by the weights that it adapts.

    The classification head, if there is one, is freshly initialised, as at the start of training.

    Raises:
        RecipeError, DataError, MissingExtraError: as for `ziggurat train`.
        RecipeError: a task by rewards, whose data have no loss.
        ConfigError: the adapted layers are quantised, or the method adapts none.
    """
    from ziggurat.recipe.needs import check as check_needs
    from ziggurat.recipe.recipe import load_recipe
    from ziggurat.training.data.examples import load_examples
    from ziggurat.training.loop.arguments import Setup
    from ziggurat.training.loop.run import make_model
    from ziggurat.training.loop.trainers import make_trainer, quiet

    recipe = load_recipe(source, [*words, "train.report_to=", "train.save=never", "train.best=false"])
    check_needs(recipe, "the gradients of a recipe's data")
    if recipe.task in REWARDED:
        raise RecipeError(
            f"task: {recipe.task} learns from rewards of the completions that the model draws while it trains, so its "
            "data have no gradients before; take a recipe with another task"
        )
    with tempfile.TemporaryDirectory() as folder, quiet():
        examples = load_examples(recipe)
        base, model, _ = make_model(recipe, examples)
        trainer: Any = make_trainer(Setup(recipe, base, model, examples, Path(folder) / "checkpoints", [])).trainer
        root: Any = trainer.model.eval()

        def losses() -> Iterator[Tensor]:
            for batch in islice(trainer.get_train_dataloader(), batches):
                yield trainer.compute_loss(root, trainer._prepare_inputs(batch))

        return gradients(root.get_base_model() if hasattr(root, "get_base_model") else root, losses())


def lay_out(
    items: Sequence[Item], budget: int, groups: int = GROUPS, by_role: bool = False
) -> tuple[dict[str, int], dict[str, list[float]], int]:
    """Ranks by tier (`<tier>:<role>` with `by_role`) for a budget of parameters, the gains of each, and their cost.

    Greedy: R_n is the residual of layer n's gradient after all chosen directions. The next rank of a tier takes, in
    each of its pairs, the largest singular value s_1 of the mean of R_n over the layers that share the pair, with the
    energy m s_1^2 for m layers. The tier with the most energy per parameter gets the rank.

    Raises:
        ConfigError: one rank for each tier is above the budget.
    """
    pyramids = [_Pyramid(members, groups) for members in _families(items)]
    cost: dict[str, int] = {}
    for tier in _Pyramid.TIERS:
        for pyramid in pyramids:
            key = f"{tier}:{pyramid.role}" if by_role else tier
            cost[key] = cost.get(key, 0) + pyramid.cost(tier)
    check_budget(sum(cost.values()), budget)
    ranks, gains, spent = dict.fromkeys(cost, 0), {key: [] for key in cost}, 0
    while True:
        reserved = sum(cost[key] for key in cost if not ranks[key])
        open_ = [k for k in cost if spent + reserved + (cost[k] if ranks[k] else 0) <= budget and ranks[k] < MOST_RANK]
        if not open_:
            return ranks, gains, spent
        worth = dict.fromkeys(open_, 0.0)
        for pyramid in pyramids:
            for key in open_:
                tier, _, role = key.partition(":")
                if role in ("", pyramid.role):
                    worth[key] += pyramid.gain(tier)
        best = max(open_, key=lambda key: worth[key] / cost[key])
        tier, _, role = best.partition(":")
        for pyramid in pyramids:
            if not by_role or role == pyramid.role:
                pyramid.take(tier)
        ranks[best] += 1
        gains[best].append(worth[best])
        spent += cost[best]


def _families(items: Sequence[Item]) -> list[list[Item]]:
    families: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        families.setdefault((item.stack, item.role, item.shape), []).append(item)
    return list(families.values())


class _Pyramid:
    """The gradients of the linear layers of one role and shape, minus the directions taken by tiers."""

    TIERS = ("global", "mid", "layer")

    def __init__(self, members: Sequence[Item], groups: int) -> None:
        self.role = members[0].role
        self.residuals = torch.stack([item.matrix for item in members if isinstance(item.matrix, Tensor)])
        numbers = {"global": [0] * len(members), "mid": [item.group(groups) for item in members]}
        numbers["layer"] = list(range(len(members)))
        #: Tier -> the layers that share each of its pairs.
        self.shared = {
            tier: [[n for n, of in enumerate(groups_of) if of == group] for group in dict.fromkeys(groups_of)]
            for tier, groups_of in numbers.items()
        }
        self._next: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def cost(self, tier: str) -> int:
        """Parameters of one rank in all pairs of a tier."""
        return len(self.shared[tier]) * sum(self.residuals.shape[1:])

    def gain(self, tier: str) -> float:
        """The energy of a tier's next rank."""
        s = self._largest(tier)[1]
        return sum(len(layers) * float(value) ** 2 for layers, value in zip(self.shared[tier], s, strict=True))

    def take(self, tier: str) -> None:
        """Give a tier its next rank."""
        for layers, u, s, v in zip(self.shared[tier], *self._largest(tier), strict=True):
            self.residuals[layers] -= s * torch.outer(u, v)
        self._next.clear()

    def _largest(self, tier: str) -> tuple[Tensor, Tensor, Tensor]:
        """u (pairs, d_out), s (pairs), v (pairs, d_in) of the mean over the layers of each pair."""
        if tier not in self._next:
            means = torch.stack([self.residuals[layers].mean(0) for layers in self.shared[tier]])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                U, S, V = torch.svd_lowrank(means, q=min(4, *means.shape[1:]), niter=8)
            self._next[tier] = U[..., 0], S[..., 0], V[..., 0]
        return self._next[tier]
