"""The schedule of pruning: when to prune, and how many directions remain."""

from typing import Any, Literal, NamedTuple

from ziggurat.errors import ConfigError
from ziggurat.host.values import Check, is_whole, shown

Phase = Literal["warm", "shrink", "final"]


def steps(least: int) -> Check:
    """The check for a number of steps (int, `least` or more) or a share of a run (float)."""

    def check(name: str, value: Any) -> None:
        share = isinstance(value, float) and 0 <= value < 1 and (value > 0 or least == 0)
        if not share and not is_whole(value, least):
            raise ConfigError(
                f"{name}={shown(value)}: a number of optimiser steps (a whole number, {least} or more), or a share of "
                "the run (a fraction from 0 up to, not including, 1, such as 0.1)."
            )

    return check


class Schedule(NamedTuple):
    """The steps of one run, counted in optimiser steps from 1: the first step ends with step = 1.

    initial: up to and including this step every direction stays. last: from this step on the
    mask is final. interval: steps between two prunings. total: the length of the run.
    """

    initial: int
    last: int
    interval: int
    total: int

    @classmethod
    def of(cls, initial_warmup: float, final_warmup: float, mask_interval: float, total: int) -> "Schedule":
        """Shares of the run (floats) become steps of a run of `total` steps; ints are steps already.

        Raises:
            ConfigError: the two warm-ups leave no step between them.
        """
        if total < 1:
            raise ConfigError(f"total={total}: the number of optimiser steps of the run, at least 1.")
        initial, final, interval = (
            round(value * total) if isinstance(value, float) else value
            for value in (initial_warmup, final_warmup, mask_interval)
        )
        # A share is below 1 but may round up to a whole short run; a number of steps has been chosen by the user.
        if isinstance(initial_warmup, float) and isinstance(final_warmup, float):
            final = min(final, total - 1)
            initial = min(initial, total - 1 - final)
        if initial + final >= total:
            raise ConfigError(
                f"initial_warmup={initial_warmup} and final_warmup={final_warmup} take {initial} + {final} steps, but "
                f"the run has {total}: no step remains for pruning in between. Lower them, or give them as shares of "
                "the run, such as 0.15 and 0.5."
            )
        return cls(initial, total - final, max(1, interval), total)

    def phase(self, step: int) -> Phase:
        """The phase of `step`: every direction stays, the budget shrinks, or the mask is final."""
        if step >= self.last:
            return "final"
        return "shrink" if step > self.initial else "warm"

    def prunes(self, step: int) -> bool:
        """Whether directions are ranked and pruned at `step`, before the final phase."""
        return self.phase(step) == "shrink" and (step - self.initial) % self.interval == 0

    def budget(self, step: int, full: int, target: int) -> int:
        """The number of directions, of `full`, that survive a pruning at `step`.

        `full` in the warm-up; `target + (full - target) (1 - p)^3`, rounded down, while the budget
        shrinks, with p the share of that phase that is over (the cubic schedule of
        AdaLoRA, arXiv 2303.10512); `target` in the final phase.
        """
        # In whole numbers, so that no rounding of a power decides over a direction.
        span = self.last - self.initial
        remaining = min(max(self.last - step, 0), span)
        return target + (full - target) * remaining**3 // span**3
