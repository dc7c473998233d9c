"""One run, from a checked recipe to an adapter folder with its scores."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, set_seed

from ziggurat.files.staging import told_of_storage
from ziggurat.host.bars import quiet
from ziggurat.recipe.methods import BUDGET
from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.tasks import REWARDED
from ziggurat.terminal import is_screen

from ..callbacks import trackers
from ..callbacks.allocation import callbacks_for
from ..callbacks.divergence import StopAtNaN
from ..callbacks.interrupt import Interrupted, StopSignals
from ..callbacks.progress import LiveProgress, ProgressFile, scores_in
from ..callbacks.rising import RisingLoss
from ..data.examples import Examples, load_examples
from ..devices import sharding
from ..devices.processes import Processes, join, launched_size
from ..folder import workplace
from ..folder.checkpoints import WholeCheckpoints, step_of
from ..folder.run_folder import RunFolder, launched
from ..model.adapt import Counts, adapt, count
from ..model.base import Base, HeadSpec, base_of
from .arguments import Setup
from .meter import Meter, expected_bytes, peak_memory
from .result import Result, save, settle
from .trainers import Task, make_trainer

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
        ProcessError: another process of the run has gone.
    """
    from ziggurat.recipe.needs import check

    check(recipe)
    processes = join()
    trackers.check(recipe.train.report_to or [])
    functions, fit = None, None
    if rewards or recipe.task in REWARDED:
        from .rewards import settle_rewards

        recipe, functions = settle_rewards(recipe, rewards)
    if BUDGET in recipe.method:
        from ..sizing.budget import settle_budget

        recipe, fit = settle_budget(recipe)
    folder = RunFolder(recipe, processes)
    folder.check()
    if console is None or not processes.main:
        console = Console(quiet=True)
    with StopSignals(processes) as stop:
        try:
            with processes.reporting_lost_ones():
                return _train(recipe, folder, stop, console, callbacks, fit, functions)
        except KeyboardInterrupt:
            stopped = _interrupted(recipe, folder, stop.number or signal.SIGINT)
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
    rewards: Mapping[str, Callable[..., Any]] | None,
) -> Result:
    processes = folder.processes
    with _status(console, "reading the data"), quiet(), processes.first_on_each_machine():
        examples = load_examples(recipe)
    with _status(console, f"loading {recipe.model}"), quiet():
        base, model, spec = make_model(recipe, examples)
    sharding.check(model, processes)
    counts, noted = count(recipe, model, base), folder.open()
    processes.first(lambda: workplace.reserve(folder.work, expected_bytes(model, base.tokenizer)))
    progress, meter, notes = LiveProgress(console, recipe.main_metric), Meter(), list[str]()
    note, warn = partial(_note, console, notes), partial(_note, console, notes, kind="warning", style="yellow")
    watch = _watch(recipe, base, note, warn)
    task = _task(recipe, base, model, examples, folder, [*callbacks, progress, stop, meter, *watch], rewards)
    note(*examples.notes, *task.notes, *_notes(recipe, processes, fit, spec), *_costs(model, counts))
    warn(*_warnings(recipe))
    begun = time.monotonic() - float(noted.get("seconds", 0.0))
    try:
        before = _score_before(recipe, task.trainer, folder, noted, console)
        answers = _answers(recipe, task.trainer, base, examples, folder, noted)
        with told_of_storage(folder.checkpoints, "Make room; where there is a checkpoint, go on with resume=true."):
            task.trainer.train(resume_from_checkpoint=str(folder.last_checkpoint()) if recipe.resume else None)
    finally:
        progress.close()
    before = before or scores_in(next((line for line in task.trainer.state.log_history if _first_scores(line)), {}))
    if stop.agreed is not None:
        folder.note({"before": before, "seconds": time.monotonic() - begun, "answers": answers.rows})
        raise _interrupted(recipe, folder, stop.agreed, task.trainer.state)
    # From here on signals are deferred until the result is saved: they could only lose what has been learned.
    after, seen = _final_scores(task, recipe), _seen(recipe, task, answers, examples, note)
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
        notes=notes,
        history=[line for line in task.trainer.state.log_history if line],
        shape=examples.shape,
        left=settle(task.trainer.model),
        **seen,
    )
    with told_of_storage(folder.final, _hint(folder.last_checkpoint())):
        processes.first(lambda: save(folder, recipe, base, task.trainer.model, state, spec, result))  # type: ignore[arg-type]
    return result


def _seen(
    recipe: Recipe, task: Task, answers: Answers, examples: Examples, note: Callable[..., None]
) -> dict[str, Any]:
    """Details of the scores after training, as fields of `Result`."""
    from .samples import example_of

    answers.write("after")
    rows = {"train": len(examples.train), "validation": len(examples.validation)}
    if examples.stream is not None:
        arguments, state = task.trainer.args, task.trainer.state
        rows["train"] = state.global_step * arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows["train"] *= arguments.world_size
        note(*(f"{count} rows of the stream {what} and were left out" for what, count in examples.stream.lost.items()))
    example, images = example_of(examples, rated=recipe.task == "reward")
    seen = {"by_class": task.by_class(), "answers": answers.rows, "rows": rows}
    return {**seen, "example": example, "example_images": images}


def _note(console: Console, notes: list[str], *texts: str, kind: str = "note", style: str = "dim") -> None:
    """Print notes, and keep them for run.json."""
    notes += texts
    for text in texts:
        # In a pipe or a log a note is one line.
        console.print(f"{kind}: {text}", style=style, highlight=False, soft_wrap=not is_screen(console))


def _watch(
    recipe: Recipe, base: Base, tell: Callable[[str], None], warn: Callable[[str], None]
) -> Iterator[TrainerCallback]:
    """The callbacks that warn if a run learns nothing, and end one that no longer improves."""
    if recipe.train.patience is not None:
        from ..callbacks.patience import StopWhenFlat
        from .metrics import lower_is_better

        metric = recipe.main_metric
        yield StopWhenFlat(metric, lower_is_better(metric), recipe.train.patience, tell)
    if recipe.task in REWARDED:
        from ..callbacks.signal import NoSignal

        yield NoSignal(warn, recipe.sampling.temperature, recipe.sampling.tokens)
    else:
        yield RisingLoss(warn, _classes(recipe, base))


def _classes(recipe: Recipe, base: Base) -> int | None:
    """The number of classes or tokens that the model chooses from; None for another kind of loss."""
    if recipe.kind.rows in ("answers", "sources"):
        return base.model.config.get_text_config().vocab_size
    if recipe.task in ("multilabel", "dpo", "kto", "reward"):  # yes or no, of each class; the better of two
        return 2
    return base.model.config.num_labels if recipe.task in ("classification", "tokens") else None


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


def _task(
    recipe: Recipe,
    base: Base,
    model: nn.Module,
    examples: Examples,
    folder: RunFolder,
    callbacks: list[TrainerCallback],
    rewards: Mapping[str, Callable[..., Any]] | None,
) -> Task:
    """The Trainer with all its callbacks, in the required order."""
    of_the_method = callbacks_for(getattr(model, "peft_config", {}).get("default"))
    callbacks = [*of_the_method, *callbacks, StopAtNaN(folder.last_checkpoint)]
    task = make_trainer(Setup(recipe, base, model, examples, folder.checkpoints, callbacks, rewards or {}))
    sharding.prepare(task.trainer, folder.processes)
    if recipe.spectra != "never":
        from ziggurat.analysis.trace import record_spectra

        record_spectra(task.trainer, recipe.spectra)
    task.trainer.add_callback(WholeCheckpoints(recipe.train.keep))
    task.trainer.add_callback(ProgressFile(folder.work / workplace.PROGRESS))
    return task


def _warnings(recipe: Recipe) -> Iterator[str]:
    if recipe.kind.experimental:
        yield f"TRL calls its trainer for task: {recipe.task} experimental: its next version may change or drop it"


def _notes(recipe: Recipe, processes: Processes, fit: Fit | None, spec: HeadSpec) -> Iterator[str]:
    if recipe.adapter is not None:
        yield f"training goes on from the adapter in {recipe.adapter}"
    if spec.images:
        adapted = {
            "language": "the language model is adapted; the image encoder stays frozen (tower: both adapts both)",
            "vision": "the image encoder is adapted; the language model stays frozen (tower: both adapts both)",
            "both": "the language model and the image encoder are adapted",
        }
        yield adapted[recipe.tower]
    if processes.way != "one":
        examples = processes.size * recipe.train.batch * recipe.train.accumulate
        yield (
            f"{launched(processes)}: {processes.size} x train.batch {recipe.train.batch} x train.accumulate "
            f"{recipe.train.accumulate} = {examples} examples a step"
        )
    if fit is not None:
        yield f"rank {fit.rank} meets the budget with {fit.parameters:,} parameters"


def _costs(model: nn.Module, counts: Counts) -> Iterator[str]:
    from ziggurat.export.serving import cost_of_serving

    if counts.lora is not None and counts.adapter > counts.lora:
        yield (
            f"the adapter trains {counts.adapter:,} parameters, more than LoRA of the same r and targets "
            f"({counts.lora:,}): in this model too few layers share"
        )
    if (served := cost_of_serving(model)) is not None:
        yield served


def _score_before(
    recipe: Recipe, trainer: Trainer, folder: RunFolder, noted: dict[str, Any], console: Console
) -> dict[str, float] | None:
    """The scores before training, noted in the run's folder; None if training itself computes them."""
    if not recipe.train.evaluate_before or "before" in noted:
        return noted.get("before", {})
    if folder.processes.way != "one":
        # A model is sharded together with its optimiser, which only training creates; after a scoring accelerate would
        # consider it prepared, and its gradients would not be averaged.
        trainer.args.eval_on_start = not recipe.resume
        trainer.add_callback(NoteFirst(folder))
        return None
    # The generators' state is restored after scoring, so that training is the same with and without it.
    with _status(console, "scoring before training"), torch.random.fork_rng(_devices()):
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


def _devices() -> list[int]:
    """The GPU whose generator scoring may use."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


class NoteFirst(TrainerCallback):
    """Writes the scores before training into the run's folder, for a resumed run."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.folder.note({"before": scores_in(kwargs.get("metrics") or {})})


def _first_scores(line: dict[str, Any]) -> bool:
    return line.get("step") == 0 and any(name.startswith("eval_") for name in line)


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
    trainer = task.trainer
    last = trainer.state.log_history[-3:]
    for line in reversed(last):
        current = line.get("step") == trainer.state.global_step
        if not recipe.train.best and current and f"eval_{recipe.main_metric}" in line and trainer.state.global_step:
            return scores_in(line)
    return scores_in(trainer.evaluate())


def resume_command(words: Sequence[str]) -> str:
    """The user's own `ziggurat train` words with resume=true, ready to paste into a shell, or behind the launcher's."""
    kept = [word for word in words if not word.startswith(("overwrite=", "resume="))]
    start = "ziggurat" if launched_size() == 1 else "the launcher, as before, -m ziggurat"
    return f"{start} train " + shlex.join([*kept, "resume=true"])
