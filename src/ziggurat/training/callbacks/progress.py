"""The progress of a running training: a bar on a terminal, plain lines elsewhere, and a file to follow."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ziggurat.terminal import is_screen

from .signal import without_reward

#: TRL's logged values of a step that drew completions -> their format in the progress and the table.
_OF_A_STEP = {
    "reward": "reward {:.2f}",
    "reward_std": "± {:.2f}",
    "frac_reward_zero_std": "{:.0%} of groups without signal",
    "completions/mean_length": "{:.1f} tokens",
    "kl": "KL {:.4f}",
}


def rewards_of(logs: Mapping[str, Any]) -> str:
    """A logged step of grpo or rloo in words, such as `reward 0.53 ± 0.50, 12% of groups without signal, 9.1 tokens`.

    Empty for lines of other tasks. ± is the standard deviation over the step's completions.
    """
    if without_reward(logs):
        return "no reward for any completion"
    parts = [words.format(logs[name]) for name, words in _OF_A_STEP.items() if logs.get(name) is not None]
    return ", ".join(parts).replace(", ±", " ±") if "reward" in logs else ""


class Logged(TrainerCallback):
    """Hands each logged line of the main process to `write`, with the step, the number of steps and the seconds left.

    The seconds (`left`) go by the pace since the run began, or was resumed; None before the first step.
    """

    _begun, _first = 0.0, 0

    def write(self, line: dict[str, Any]) -> None:
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        done, seconds_left = state.global_step - self._first, None
        if done > 0:
            seconds_left = round((time.monotonic() - self._begun) / done * (state.max_steps - state.global_step), 1)
        self.write({"step": state.global_step, "steps": state.max_steps, "left": seconds_left, **(logs or {})})


class ProgressFile(Logged):
    """Appends every logged number to a file.

    A resumed run continues the same file; for repeated steps the later line counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: dict[str, Any]) -> None:
        numbers = {name: value for name, value in line.items() if name == "left" or isinstance(value, int | float)}
        # A full disk stops a run when it saves, not when it reports.
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")


def in_words(seconds: float) -> str:
    """A duration: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def scores_in(line: Mapping[str, Any]) -> dict[str, float]:
    """The validation scores of a logged line, without Trainer's timing."""
    timing = ("runtime", "per_second", "preparation_time", "num_tokens")
    scores = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    return {name: float(value) for name, value in scores.items() if not any(word in name for word in timing)}


def line_of(line: dict[str, Any]) -> str:
    """A logged line in words: `step 10 of 188, loss 0.643, rate 9.5e-04, 45 s left`."""
    parts = [f"step {line['step']} of {line['steps']}" if line["steps"] else "before training"]
    if "reward" in line:
        parts.append(rewards_of(line))
    elif "loss" in line:
        parts.append(f"loss {line['loss']:.4g}")
    if "learning_rate" in line:
        parts.append(f"rate {line['learning_rate']:.1e}")
    parts += [f"{name} {value:.4g}" for name, value in scores_in(line).items()]
    if line.get("left") and "loss" in line:
        parts.append(f"{in_words(line['left'])} left")
    return ", ".join(parts)


class LiveProgress(Logged):
    """A rich bar with the loss and the last score; on a console that is no terminal, a line for each log entry."""

    def __init__(self, console: Console, metric: str) -> None:
        self.console, self.metric = console, metric
        self.bar: Progress | None = None
        self.task: Any = None
        self._shown = {"step": "", "score": ""}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if not is_screen(self.console) or not state.is_world_process_zero:
            return
        self.bar = Progress(
            TextColumn("learning"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task("learning", total=state.max_steps, completed=state.global_step, shown="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def write(self, line: dict[str, Any]) -> None:
        if not isinstance(line.get("loss"), int | float):
            return
        if self.bar is None:
            self.console.print(line_of(line), highlight=False, soft_wrap=True)
        else:
            self._show(self.bar, "step", rewards_of(line) or f"loss {line['loss']:.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        value = (kwargs.get("metrics") or {}).get(f"eval_{self.metric}")
        if value is None or state.global_step == 0:
            return
        score = f"{self.metric} {value:.2f}"
        if self.bar is not None:
            self._show(self.bar, "score", score)
        elif state.is_world_process_zero and state.global_step < state.max_steps:
            self.console.print(f"step {state.global_step} of {state.max_steps}: {score}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Release the terminal; safe to call again, and after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _show(self, bar: Progress, part: str, words: str) -> None:
        self._shown[part] = words
        bar.update(self.task, shown="  ".join(filter(None, self._shown.values())))
