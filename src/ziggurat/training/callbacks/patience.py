"""Ends a run whose score no longer improves."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class StopWhenFlat(TrainerCallback):
    """Stops training after `patience` scorings since the best one, counted in the log, which a resumed run keeps.

    `lower`: the lower `metric`, the better.
    """

    def __init__(self, metric: str, lower: bool, patience: int, tell: Callable[[str], None]) -> None:
        self.metric, self.lower, self.patience, self.tell = metric, lower, patience, tell

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        name = f"eval_{self.metric}"
        scores = [line[name] for line in state.log_history if name in line]
        sign = -1 if self.lower else 1
        best = max(range(len(scores)), key=lambda place: sign * scores[place], default=0)
        if state.global_step and len(scores) - 1 - best >= self.patience:
            control.should_training_stop = True
            self.tell(
                f"stopped after step {state.global_step}: {self.patience} scorings without a better {self.metric}"
            )
