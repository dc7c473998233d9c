"""A run that is stopped at a step, as by Ctrl-C."""

import signal
from typing import Any

from transformers import TrainerCallback


class StopAt(TrainerCallback):
    """Ctrl-C in the middle of a step: once, so that the run saves a checkpoint, or twice, so that it ends at once."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
