"""One run, from a checked recipe to an adapter folder with its scores."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, set_seed

from ziggurat.files.staging import told_of_storage
from ziggurat.host.bars import quiet
from ziggurat.recipe.schema import Recipe
from ziggurat.terminal import is_screen

from ..callbacks import trackers
from ..callbacks.allocation import callbacks_for
from ..callbacks.divergence import StopAtNaN
from ..callbacks.interrupt import Interrupted, StopSignals
from ..callbacks.progress import LiveProgress, ProgressFile, scores_in
from ..data.examples import Examples, load_examples
from ..devices import sharding
from ..devices.processes import Processes, join, launched_size
from ..folder import workplace
from ..folder.checkpoints import WholeCheckpoints, step_of
from ..folder.run_folder import RunFolder
from ..model.adapt import adapt, count
from ..model.base import Base, HeadSpec, base_of
from .arguments import Setup, Task
from .meter import Meter, expected_bytes, peak_memory
from .notes import Notes, of_costs, of_settings, watching
from .result import Result, save, settle
from .trainers import make_trainer

if TYPE_CHECKING:
    from ..sizing.budget import Fit
    from .samples import Answers


def train(
    recipe: Recipe,
    *,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    rewards: Sequence[Callable[..., Any]] = (),
) -> Result:
    """Train by a recipe; the folder `recipe.folder` appears when the run is complete.

    `callbacks` are added to the Trainer's, `rewards` to those that a recipe of grpo or rloo names. `console` shows the
    progress (default: no output). Under `accelerate launch` or `torchrun` each process calls this; all get the result,
    one prints and writes.

    Raises:
        MissingExtraError: packages that the recipe needs aren't installed.
        RecipeError: the folder is taken, the model can't be loaded, or the method doesn't fit it.
        DataError: the data don't match the recipe.
        RewardError: a reward function ended in an error, or returned no number for each completion.
        DivergedError: a loss or a weight became NaN or infinite; names the step and the last good checkpoint.
        Interrupted: Ctrl-C or SIGTERM; names the last checkpoint.
        ProcessError: another process of the run has ended.
    """
    from ziggurat.recipe.needs import check

    from ..sizing.budget import settle_budget
    from .rewards import settle_rewards

    check(recipe)
    processes = join()
    trackers.check(recipe.train.report_to or [])
    recipe, functions = settle_rewards(recipe, rewards)
    recipe, fit = settle_budget(recipe)
    folder = RunFolder(recipe, processes)
    folder.check()
    if console is None or not processes.main:
        console = Console(quiet=True)
    with StopSignals(processes) as stop:
        try:
            with processes.reporting_lost_processes():
                return _train(recipe, folder, stop, console, callbacks, fit, functions)
        except KeyboardInterrupt:
            stopped = _interrupted(recipe, folder, stop.number or signal.SIGINT, stop.state)
            folder.abandon()
            raise stopped from None
        except BaseException as error:
            if not isinstance(error, Interrupted):
                folder.abandon()
            raise
        finally:
            folder.lock.release()


def _train(
    recipe: Recipe,
    folder: RunFolder,
    stop: StopSignals,
    console: Console,
    callbacks: Sequence[TrainerCallback],
    fit: Fit | None,
    rewards: Mapping[str, Callable[..., Any]],
) -> Result:
    processes = folder.processes
    examples, base, model, spec = _load(recipe, processes, console)
    counts, noted = count(model, base), folder.open()
    processes.first(lambda: workplace.reserve(folder.work, expected_bytes(model, base.tokenizer)))
    progress, meter, notes = LiveProgress(console, recipe.main_metric), Meter(), Notes(console)
    callbacks = [*callbacks, progress, stop, meter, *watching(recipe, base, notes)]
    task = _task(Setup(recipe, base, model, examples, folder.checkpoints, callbacks, rewards), folder)
    notes.note(*examples.notes, *task.notes)
    notes.note(*of_settings(recipe, processes, fit, spec), *of_costs(model, counts))
    if recipe.kind.experimental:
        notes.warn(
            f"TRL calls its trainer for task: {recipe.task} experimental: its next version may change or drop it"
        )
    begun = time.monotonic() - float(noted.get("seconds", 0.0))
    try:
        before = _score_before(recipe, task.trainer, folder, noted, console)
        answers = _answers(recipe, task.trainer, base, examples, folder, noted)
        with told_of_storage(folder.checkpoints, "Make room; where there is a checkpoint, go on with resume=true."):
            task.trainer.train(resume_from_checkpoint=str(folder.last_checkpoint()) if recipe.resume else None)
    finally:
        progress.close()
    # A resumed run's checkpoint has them too, where the folder's note is lost.
    before = before or scores_in(next((line for line in task.trainer.state.log_history if line.get("step") == 0), {}))
    if stop.agreed is not None:
        folder.note({"before": before, "seconds": time.monotonic() - begun, "answers": answers.rows})
        raise _interrupted(recipe, folder, stop.agreed, task.trainer.state)
    # From here on a signal ends the run at once; what has been learned is in its last checkpoint, where it has one.
    after, details = _final_scores(task, recipe), _details(recipe, task, answers, examples, notes)
    trackers.close(task.trainer)
    state = sharding.whole_state(task.trainer, processes)
    result = Result(
        folder=folder.final,
        method=recipe.method["name"],
        metric=recipe.main_metric,
        before=before,
        after=after,
        guess=task.guess,
        counts=counts,
        seconds=time.monotonic() - begun,
        steps=task.trainer.state.global_step,
        peak_mb=peak_memory(),
        step_seconds=meter.step_seconds,
        notes=notes.texts,
        history=[line for line in task.trainer.state.log_history if line],
        shape=examples.shape,
        left=settle(task.trainer.model),
        **details,
    )
    with told_of_storage(folder.final, _hint(folder.last_checkpoint())):
        processes.first(lambda: save(folder, recipe, base, task.trainer.model, state, spec, result))  # type: ignore[arg-type]
    return result


def _load(recipe: Recipe, processes: Processes, console: Console) -> tuple[Examples, Base, nn.Module, HeadSpec]:
    with _status(console, "reading the data"), quiet(), processes.first_on_each_machine():
        examples = load_examples(recipe)
    with _status(console, f"loading {recipe.model}"), quiet():
        base, model, spec = make_model(recipe, examples)
    sharding.check(model, processes)
    return examples, base, model, spec


def _details(recipe: Recipe, task: Task, answers: Answers, examples: Examples, notes: Notes) -> dict[str, Any]:
    """Details of the scores after training, as fields of `Result`."""
    from .samples import example_of

    answers.write("after")
    rows = {"train": len(examples.train), "validation": len(examples.validation)}
    if examples.stream is not None:
        arguments, state = task.trainer.args, task.trainer.state
        rows["train"] = state.global_step * arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows["train"] *= arguments.world_size
        lost = examples.stream.lost.items()
        notes.note(*(f"{count} rows of the stream {reason} and were left out" for reason, count in lost))
    if (alike := task.alike()) is not None:
        notes.warn(alike)
    example, images = example_of(examples, rated=recipe.task == "reward")
    details = {"by_class": task.by_class(), "answers": answers.rows, "rows": rows, "warnings": notes.warnings}
    return {**details, "example": example, "example_images": images}


def _hint(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "There is no checkpoint."
    return f"The checkpoint {checkpoint} is whole; make room and go on with resume=true."


def _status(console: Console, text: str) -> AbstractContextManager[Any]:
    """A spinner with `text` on a terminal; nothing elsewhere."""
    return console.status(text) if is_screen(console) else nullcontext()


def _interrupted(recipe: Recipe, folder: RunFolder, number: int, state: TrainerState | None = None) -> Interrupted:
    """The exception of a run stopped by the signal `number`; without `state` outside the training loop."""
    checkpoint = folder.last_checkpoint()
    step = state.global_step if state is not None else step_of(checkpoint) if checkpoint is not None else 0
    total = state.max_steps if state is not None else 0
    return Interrupted(recipe.folder, str(checkpoint) if checkpoint is not None else None, step, total, number)


def _task(setup: Setup, folder: RunFolder) -> Task:
    """The Trainer with all its callbacks, in the required order."""
    of_the_method = callbacks_for(getattr(setup.model, "peft_config", {}).get("default"))
    task = make_trainer(replace(setup, callbacks=[*of_the_method, *setup.callbacks, StopAtNaN(folder.last_checkpoint)]))
    sharding.prepare(task.trainer, folder.processes)
    if setup.recipe.spectra != "never":
        from ziggurat.analysis.trace import record_spectra

        record_spectra(task.trainer, setup.recipe.spectra)
    task.trainer.add_callback(WholeCheckpoints(setup.recipe.train.keep))
    task.trainer.add_callback(ProgressFile(folder.work / workplace.PROGRESS))
    return task


def _score_before(
    recipe: Recipe, trainer: Trainer, folder: RunFolder, noted: dict[str, Any], console: Console
) -> dict[str, float]:
    """The scores before training, noted in the run's folder; empty until training if training itself computes them."""
    if not recipe.train.evaluate_before or "before" in noted:
        return noted.get("before", {})
    if folder.processes.way != "one":
        # A model is sharded together with its optimiser, which only training creates; after a scoring accelerate would
        # consider it prepared, and its gradients would not be averaged.
        trainer.args.eval_on_start = not recipe.resume
        first = NoteFirst(folder)
        trainer.add_callback(first)
        return first.scores
    # The generators' state is restored after scoring, so that training is the same with and without it.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _status(console, "scoring before training"), torch.random.fork_rng(devices):
        before = scores_in(trainer.evaluate())
    folder.note({"before": before})
    return before


def _answers(
    recipe: Recipe, trainer: Trainer, base: Base, examples: Examples, folder: RunFolder, noted: dict[str, Any]
) -> Answers:
    """The answers before training, noted in the run's folder beside the scores."""
    from .samples import Answers

    answers = Answers(recipe, trainer, base, examples.validation, alone=folder.processes.way == "one")
    if "answers" in noted:
        # `train.answers` may differ in the resumed run; the questions keep their order.
        for row, earlier in zip(answers.rows, noted["answers"], strict=False):
            row |= earlier
    elif recipe.train.evaluate_before and answers.rows:
        answers.write("before")
        folder.note({**folder.noted(), "answers": answers.rows})
    return answers


class NoteFirst(TrainerCallback):
    """Takes the scores before training, and writes them into the run's folder for a resumed run."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.scores: dict[str, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.scores |= scores_in(kwargs.get("metrics") or {})
            self.folder.note({"before": self.scores})


def make_model(recipe: Recipe, examples: Examples) -> tuple[Base, nn.Module, HeadSpec]:
    """The base model, the same with the recipe's method in it, and its head."""
    spec = HeadSpec(
        task=recipe.task,
        label_names=examples.label_names,
        pooling=recipe.head.pooling,
        dropout=recipe.head.dropout,
        pair=recipe.data.text_pair is not None,
        images=examples.has_images,
    )
    # The head is seeded apart from the method, so that every method starts from the same head.
    set_seed(recipe.seed)
    base = base_of(recipe, spec, attention=recipe.attn_implementation)
    set_seed(recipe.seed)
    return base, adapt(recipe, base), spec


def _final_scores(task: Task, recipe: Recipe) -> dict[str, float]:
    """The scores of the saved weights: of training's last evaluation if it scored these weights, else of a new one."""
    state, name = task.trainer.state, f"eval_{recipe.main_metric}"
    last = next((line for line in reversed(state.log_history[-3:]) if name in line), {})
    if not recipe.train.best and state.global_step and last.get("step") == state.global_step:
        return scores_in(last)
    return scores_in(task.trainer.evaluate())


def resume_command(words: Sequence[str]) -> str:
    """The user's own `ziggurat train` words with resume=true, ready to paste into a shell, or after the launcher's."""
    arguments = [word for word in words if not word.startswith(("overwrite=", "resume="))]
    start = "ziggurat" if launched_size() == 1 else "the launcher, as before, -m ziggurat"
    return f"{start} train " + shlex.join([*arguments, "resume=true"])
