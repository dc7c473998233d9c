"""Warns during a run when the loss rises above its start, with the likely cause."""

import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: The Trainer logs the loss of the first step, before any update, then means over `EVERY` steps.
EVERY = 10
#: The number of last logged losses whose mean is the current loss; one alone may be high by chance.
RECENT = 2
#: A loss has risen if it lies above the start by this share of it: above the loss of the first step, which is one
#: batch's, or above the first mean,
LEAST_RISE = (0.25, 0.1)
#: and by this many standard errors: the loss of a run that learns nothing fluctuates too.
STANDARD_ERRORS = 5.0
#: The upper bound of the noise of a mean, as a share of the start: the erratic losses of a broken run would hide its
#: rise.
MOST_NOISE = 0.05


class RisingLoss(TrainerCallback):
    """Warns once if the training loss lies above its start after the warm-up, once if above that of a uniform guess.

    It reads the Trainer's log and needs four losses, those of 30 steps.

    Args:
        tell: receives the warning.
        classes: the number of classes or tokens to choose from; a uniform guess has the loss ln(classes). None: the
            loss isn't one of probabilities.
    """

    def __init__(self, tell: Callable[[str], None], classes: int | None) -> None:
        self._tell, self._classes = tell, classes
        self._losses: list[float] = []
        self._warned: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run has the losses from before in its log.
        self._losses = [line["loss"] for line in state.log_history if "loss" in line]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if not isinstance(loss, float) or not math.isfinite(loss):
            return
        self._losses.append(loss)
        guess = math.log(self._classes) if self._classes else 0.0
        if state.global_step <= args.get_warmup_steps(state.max_steps) or not has_risen(self._losses, guess):
            return
        start, now = self._losses[0], statistics.fmean(self._losses[-RECENT:])
        level = "guess" if guess and now > guess else "start"
        if level in self._warned:
            return
        self._warned |= {level, "start"}
        than = f", and that of a uniform guess among {self._classes:,} is {guess:.3f}" if level == "guess" else ""
        self._tell(
            f"step {state.global_step} of {state.max_steps}: the training loss is {now:.3f}; at the start it was "
            f"{start:.3f}{than}. {_hint(args)}"
        )


def has_risen(losses: list[float], guess: float = 0.0) -> bool:
    """Whether the mean of the last losses lies significantly above the start.

    `losses`: that of the first step, then means over `EVERY` steps. The start is the first step's loss or, as that is
    one batch's, the first mean: lying above one of them is enough. The noise of a mean is estimated by the differences
    of neighbours, whose median size is 0.95 of its standard deviation; of two differences the smaller one counts.
    `guess`: the loss of a uniform guess. A start far below it may double by a single hard batch.
    """
    first, means = losses[0], losses[1:]
    if len(means) <= RECENT:
        return False
    steps = sorted(abs(after - before) for before, after in pairwise(means))
    noise = steps[(len(steps) - 1) // 2] / 0.95
    now = statistics.fmean(means[-RECENT:])
    for start, share, variance in zip((first, means[0]), LEAST_RISE, (EVERY, 1), strict=True):
        error = min(noise, MOST_NOISE * max(abs(start), guess / 4)) * math.sqrt(1 / RECENT + variance)
        if now - start > max(share * abs(start), STANDARD_ERRORS * error):
            return True
    return False


def _hint(args: TrainingArguments) -> str:
    """The most frequent causes of a rising loss, for these settings."""
    parts = [f"lower train.lr (now {args.learning_rate:g}; the best rate of one method breaks another)"]
    if not args.warmup_steps:
        parts.append("begin with train.warmup=0.05")
    if not args.max_grad_norm:
        parts.append("clip gradients by train.max_grad_norm=1.0")
    return f"Most likely the steps are too large: {', or '.join(parts)}."
