"""Ctrl-C and SIGTERM end a run at the next step with a checkpoint, not in the middle of one."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..devices.processes import Processes


class Interrupted(Exception):
    """A run was stopped by a signal, number `signal`, at a step of `total` (0: outside the training loop).

    `checkpoint` is its last one, None if it has none.
    """

    def __init__(self, folder: str, checkpoint: str | None, step: int, total: int, number: int) -> None:
        before = f"stopped before training went on from step {step}" if step else "stopped before the first step"
        super().__init__(f"stopped at step {step} of {total}" if step and total else before)
        self.folder, self.checkpoint, self.signal = folder, checkpoint, number
        self.step, self.total = step, total


class StopSignals(TrainerCallback):
    """While entered, SIGINT and SIGTERM ask the Trainer to save and stop; a second SIGINT stops at once.

    Outside the training loop (loading, scoring before training) there is nothing to save and the signal raises
    KeyboardInterrupt at once. Signals reach only the main thread: elsewhere this does nothing.

    Several processes compare their signals after every step, so that all stop at the same step. `number` is this
    process's signal, `agreed` the common one.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.number: int | None = None
        self.agreed: int | None = None
        self.learning = False
        #: The Trainer's, from the start of training on.
        self.state: TrainerState | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and number == signal.SIGINT
        self.number = number
        if again or not self.learning:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning, self.state = True, state

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
        return self._stop(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
        # A signal during a long scoring takes effect right after it.
        return self._stop(control) if self.learning else control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
        if self.agreed is not None:
            # A Trainer that was stopped in the middle of an epoch calls this too. At the real end of an epoch, a
            # scoring that is due runs and the checkpoint is written again: see `_stop`.
            ended = state.epoch is not None and float(state.epoch).is_integer()
            control.should_evaluate = control.should_evaluate and ended
            control.should_save = control.should_evaluate
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning = False

    def _stop(self, control: TrainerControl) -> TrainerControl:
        # A scoring that is due at this step still runs, before the checkpoint: it draws random numbers, and without
        # them the resumed run would differ from the uninterrupted one.
        self.agreed = self.processes.largest(self.number or 0) or None
        if self.agreed is not None:
            control.should_save = control.should_training_stop = True
        return control
