"""The callbacks that ride along in every Trainer: a look at what trains and moves, and `step`. They load its module."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from ziggurat.host.card import keep_section
from ziggurat.host.lifecycle import STEPPED, Watch, check_moves, check_something_trains, step


class TrainingWatch(TrainerCallback):
    """Warns where no parameter of an adapter trains and where it hardly moves, and keeps the model card's section.

    Rides along in every Trainer.
    """

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        keep_section()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_something_trains(model)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        Watch.reset(model)
        warmup, total = args.get_warmup_steps(state.max_steps), state.max_steps
        # Some steps at the full rate, so that even a run without warm-up has begun to move.
        if state.global_step == warmup + max(5, total // 20):
            check_moves(model, f"at step {state.global_step} of {total}, after the warm-up", args.learning_rate)


class StepCallback(TrainerCallback):
    """Calls `ziggurat.step` for methods that bring no callback of their own. Rides along in every Trainer."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._step(model, state.global_step, state.max_steps, kwargs.get("optimizer"))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._step(model, state.global_step + 1, state.max_steps, kwargs.get("optimizer"))

    @staticmethod
    def _step(model: Any, done: int, total: int, optimizer: Any) -> None:
        if isinstance(model, nn.Module) and total > 0:
            step(model, done, total, optimizer, only=STEPPED)
