"""95% intervals of scores of rows."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

#: The confidence level in per cent, and the number of bootstrap samples for scores without a closed form.
CONFIDENCE, RESAMPLES = 95, 1000


def share_interval(hits: int, rows: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, in per cent (E. B. Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, rows).proportion_ci(CONFIDENCE / 100, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)


#: Factors of the standard error of atanh(r), 1 / sqrt(n - 3): Fisher 1921; Fieller et al. 1957.
FACTORS = {"pearson": 1.0, "spearman": 1.03}


def correlation_interval(name: str, value: float, rows: int) -> tuple[float, float]:
    """The 95% interval tanh(atanh r +- 1.96 s) of a correlation of more than 3 rows, in per cent."""
    middle, half = math.atanh(max(min(value / 100, 1 - 1e-12), 1e-12 - 1)), 1.96 * FACTORS[name] / math.sqrt(rows - 3)
    return 100.0 * math.tanh(middle - half), 100.0 * math.tanh(middle + half)


def drawn_intervals(of_rows: Callable[[np.ndarray], Mapping[str, float]], rows: int) -> dict[str, tuple[float, float]]:
    """The 95% percentile bootstrap: scores of rows drawn with replacement, `RESAMPLES` times, with a fixed seed.

    A score that is the same in all draws, as where every row is right, has none: draws can't show what no row shows.
    """
    random = np.random.default_rng(0)
    draws = [of_rows(random.integers(rows, size=rows)) for _ in range(RESAMPLES)]
    drawn = {name: [scores[name] for scores in draws if not math.isnan(scores[name])] for name in draws[0]}
    return {name: _middle(values) for name, values in drawn.items() if values and min(values) < max(values)}


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The percentiles between which 95% of the values lie."""
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail], method="nearest")  # some may be infinite
    return float(low), float(high)


def means_of(scores: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """The mean of each score over some rows."""
    return {name: float(of[rows].mean()) for name, of in scores.items()}
