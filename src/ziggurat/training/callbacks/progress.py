"""The progress bar while a run trains; plain lines on a console that is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class LiveProgress(TrainerCallback):
    """A rich bar with the loss and the last score; on a console that is no terminal, a line per evaluation."""

    def __init__(self, console: Console, metric: str) -> None:
        self.console = console
        self.metric = metric
        self.bar: Progress | None = None
        self.task: Any = None
        self.loss: float | None = None
        self.score: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.console.is_terminal or not state.is_world_process_zero:
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

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and isinstance(logs.get("loss"), (int, float)):
            self.loss = float(logs["loss"])
            self._say()

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None or state.global_step == 0:
            return
        self.score = float(value)
        if self.bar is not None:
            self._say()
        elif state.is_world_process_zero and state.global_step < state.max_steps:
            self.console.print(f"step {state.global_step} of {state.max_steps}: {self.metric} {self.score:.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call again, and after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _say(self) -> None:
        if self.bar is not None:
            parts = [f"loss {self.loss:.3f}"] if self.loss is not None else []
            parts += [f"{self.metric} {self.score:.2f}"] if self.score is not None else []
            self.bar.update(self.task, shown="  ".join(parts))
