"""Warns when a run begins whose learning rate never reaches `train.lr`."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LongWarmUp(TrainerCallback):
    """Warns if the warm-up takes all steps of the run. `tell` receives the warning."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = args.get_warmup_steps(state.max_steps)
        if args.lr_scheduler_type != "constant" and 0 < state.max_steps <= steps:
            self._tell(
                f"the warm-up (train.warmup) isn't over when the run ends, after step {state.max_steps}: the learning "
                f"rate never reaches train.lr, {args.learning_rate:g}. Shorten it, or train longer"
            )
