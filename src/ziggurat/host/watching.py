"""The callbacks of every Trainer: warnings about frozen or unmoving adapters, and `step`. They load Trainer's
module."""

import base64
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ziggurat.host.lifecycle import STEPPED, Watch, check_moves, check_something_trains, resume, run_state, step
from ziggurat.host.saved.card import keep_section

#: The beginning of a state's name in a checkpoint's trainer_state.json, before the method's name.
KEY = "ziggurat."


class TrainingWatch(TrainerCallback):
    """Warns where no parameter of an adapter trains and where it hardly moves, and keeps the model card's section.

    Every Trainer gets one.
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
    """Calls `ziggurat.step` for the methods in `STEPPED`, and keeps their state for a resumed run in checkpoints.

    Every Trainer gets one. It gives a callback not the folder that a run resumes from, but the state that
    it has read there: so the state is stored in trainer_state.json, among the states of callbacks.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step and isinstance(model, nn.Module):
            callbacks: Any = state.stateful_callbacks
            saved = {
                name: load(base64.b64decode(callbacks[KEY + name]["state"]))
                for name in STEPPED
                if KEY + name in callbacks
            }
            resume(model, saved, state.global_step, state.max_steps, kwargs.get("optimizer"), only=STEPPED)
        else:
            self._step(model, 0, state.max_steps, kwargs.get("optimizer"))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._step(model, state.global_step + 1, state.max_steps, kwargs.get("optimizer"))

    def on_save(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        callbacks: Any = state.stateful_callbacks
        states = run_state(model, only=STEPPED) if isinstance(model, nn.Module) else {}
        for name, tensors in states.items():
            text = base64.b64encode(save(tensors)).decode()
            callbacks[KEY + name] = {"format": "safetensors, base64", "state": text}
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if states and state.is_world_process_zero and folder.is_dir():
            state.save_to_json(str(folder / "trainer_state.json"))

    @staticmethod
    def _step(model: Any, done: int, total: int, optimizer: Any) -> None:
        if isinstance(model, nn.Module) and total > 0:
            step(model, done, total, optimizer, only=STEPPED)
