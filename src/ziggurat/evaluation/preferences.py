"""A trained adapter's rewards on preference data: accuracies of pairs, margins of verdicts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.errors import DataError, RecipeError

from .intervals import drawn_intervals, means_of, share_interval
from .logs import answer_logs

if TYPE_CHECKING:
    from datasets import Dataset

    from ziggurat.training.answers.load import Loaded


def preferences(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """Share of pairs whose better answer has the greater reward, and the rewards' mean distance."""
    from ziggurat.training.data.prefer import worse_of

    notes: list[str] = []
    better, lesser = (_rewards(loaded, part, batch, notes) for part in (table, worse_of(table)))
    gaps = better - lesser
    hits = int((gaps > 0).sum())
    return {
        "scores": {"accuracy": 100.0 * hits / len(gaps), "margin": float(gaps.mean())},
        "intervals": {
            "accuracy": share_interval(hits, len(gaps)),
            **drawn_intervals(partial(means_of, {"margin": gaps}), len(gaps)),
        },
        "per_cent": ("accuracy",),
        "notes": list(dict.fromkeys(notes)),
    }


def judged(loaded: Loaded, table: Dataset, batch: int) -> dict[str, Any]:
    """The distance between the mean rewards of good and of bad answers."""
    notes: list[str] = []
    good = np.asarray(table["good"], dtype=bool)
    if good.all() or not good.any():
        kind = "good" if good.all() else "bad"
        raise DataError(f"--data: all {len(good)} answers are {kind}, and their distance needs both; raise --limit")
    rewards = _rewards(loaded, table, batch, notes)

    def of_rows(drawn: np.ndarray) -> dict[str, float]:
        """NaN for a draw of one kind."""
        kinds = [rewards[drawn][good[drawn] == kind] for kind in (True, False)]
        return {"margin": float(kinds[0].mean() - kinds[1].mean()) if all(map(len, kinds)) else float("nan")}

    scores = of_rows(np.arange(len(good)))
    return {"scores": scores, "intervals": drawn_intervals(of_rows, len(good)), "per_cent": (), "notes": notes}


def _rewards(loaded: Loaded, table: Dataset, batch: int, notes: list[str]) -> np.ndarray:
    """The reward of every row: that of a reward model, or beta (ln p(y | x) - ln p_ref(y | x)), as in DPO and KTO.

    The reference is the model without its adapter. ORPO has none: its reward is beta times the mean of ln p a token.
    """
    if loaded.recipe.task == "reward":
        from ziggurat.training.answers.rewards import rewards_of

        return np.asarray(list(rewards_of(loaded, table, batch, notes)))
    from ziggurat.training.data.tokens import tokens_of

    rows, beta = tokens_of(loaded.recipe, loaded.tokenizer, table, "scored", notes), loaded.recipe.train.beta
    if loaded.recipe.task == "orpo":
        logs, counts = answer_logs(loaded, rows, batch, notes)
        return beta * logs / counts
    if loaded.recipe.adapter is not None:
        notes.append(
            "rewards are relative to the model without an adapter; the run's were, to the adapter it started from"
        )
    without: Any = getattr(loaded.model, "disable_adapter", None)
    if without is None:
        raise RecipeError("--data: rewards are differences to the model without its adapter, and this run has none")
    logs, _ = answer_logs(loaded, rows, batch, notes)
    with without():
        before, _ = answer_logs(loaded, rows, batch, [])
    return beta * (logs - before)
