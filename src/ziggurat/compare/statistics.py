"""Means, spreads, and differences to a baseline that are paired by seed."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ziggurat.extras import require


@dataclass(frozen=True)
class Cell:
    """Scores of one method on one task, by seed."""

    scores: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with one seed, NaN where one of them is infinite or NaN."""
        values = list(self.scores.values())
        if len(values) < 2:
            return None
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


@dataclass(frozen=True)
class Difference:
    """Mean of the differences of the pairs, and half the width of its interval; None with one pair."""

    pairs: int
    mean: float
    half: float | None

    @property
    def low(self) -> float:
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        return math.inf if self.half is None else self.mean + self.half

    def excludes_zero(self) -> bool:
        """Never if all pairs differ by the same: two seeds may agree by chance."""
        return self.half != 0 and (self.low > 0 or self.high < 0)


def paired(scores: Mapping[int, float], baseline: Mapping[int, float], confidence: float) -> Difference | None:
    r"""scores - baseline over the seeds that both have: mean d, and t_{n-1} s_d / sqrt(n) (Student).

    The same seed means the same split, head and order of the data, so their common effect cancels. `confidence` in per
    cent. None where no seed is shared. Differences without any spread have an interval of no width.

    Raises MissingExtraError without scipy.
    """
    gaps = [scores[seed] - baseline[seed] for seed in sorted(set(scores) & set(baseline))]
    if not gaps:
        return None
    if len(gaps) == 1:
        return Difference(1, gaps[0], None)
    require("an interval of paired differences", "scipy")
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # differences without any spread, or infinite ones
        low, high = ttest_1samp(gaps, 0.0).confidence_interval(confidence / 100)
    return Difference(len(gaps), statistics.fmean(gaps), float(high - low) / 2)


def averages(cells: Sequence[Cell | None]) -> Cell | None:
    """The mean over the tasks, by seed, for the seeds that every task has; None if there is no such seed."""
    if not cells or any(cell is None for cell in cells):
        return None
    whole = [cell for cell in cells if cell is not None]
    shared = set.intersection(*(set(cell.scores) for cell in whole))
    if not shared:
        return None
    return Cell({seed: statistics.fmean(cell.scores[seed] for cell in whole) for seed in sorted(shared)})
