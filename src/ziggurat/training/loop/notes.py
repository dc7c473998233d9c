"""The notes and warnings that a run prints, before training and during it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback

from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.tasks import REWARDED
from ziggurat.terminal import is_screen

from ..callbacks.rising import RisingLoss
from ..callbacks.warmup import LongWarmUp
from ..devices.processes import Processes
from ..folder.run_folder import launched
from ..model.adapt import Counts
from ..model.base import Base, HeadSpec

if TYPE_CHECKING:
    from ..sizing.budget import Fit

#: Tower -> the note on a model that sees images.
_TOWERS = {
    "language": "the language model is adapted; the image encoder stays frozen (tower: both adapts both)",
    "vision": "the image encoder is adapted; the language model stays frozen (tower: both adapts both)",
    "both": "the language model and the image encoder are adapted",
}


class Notes:
    """Prints a run's notes, and keeps them for run.json."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.texts: list[str] = []
        #: Those of `texts` that are warnings.
        self.warnings: list[str] = []

    def note(self, *texts: str) -> None:
        self._print("note", "dim", *texts)

    def warn(self, *texts: str) -> None:
        self.warnings += texts
        self._print("warning", "yellow", *texts)

    def _print(self, kind: str, style: str, *texts: str) -> None:
        self.texts += texts
        for text in texts:
            # In a pipe or a log a note is one line.
            self.console.print(f"{kind}: {text}", style=style, highlight=False, soft_wrap=not is_screen(self.console))


def watching(recipe: Recipe, base: Base, notes: Notes) -> Iterator[TrainerCallback]:
    """The callbacks that warn if a run learns nothing, and end one that no longer improves."""
    yield LongWarmUp(notes.warn)
    if recipe.train.patience is not None:
        from ..callbacks.patience import StopWhenFlat
        from .metrics import lower_is_better

        metric = recipe.main_metric
        yield StopWhenFlat(metric, lower_is_better(metric), recipe.train.patience, notes.note)
    if recipe.task in REWARDED:
        from ..callbacks.signal import NoSignal

        yield NoSignal(notes.warn, recipe.sampling.temperature, recipe.sampling.tokens)
    else:
        yield RisingLoss(notes.warn, _classes(recipe, base))


def _classes(recipe: Recipe, base: Base) -> int | None:
    """The number of classes or tokens that the model chooses from; None for another kind of loss."""
    if recipe.kind.rows in ("answers", "sources"):
        return base.model.config.get_text_config().vocab_size
    if recipe.task in ("multilabel", "dpo", "kto", "reward"):  # yes or no, of each class; the better of two
        return 2
    return base.model.config.num_labels if recipe.task in ("classification", "tokens") else None


def of_settings(recipe: Recipe, processes: Processes, fit: Fit | None, spec: HeadSpec) -> Iterator[str]:
    """Notes on the settings of the recipe and of the launcher."""
    if recipe.adapter is not None:
        yield f"training goes on from the adapter in {recipe.adapter}"
    if spec.images:
        yield _TOWERS[recipe.tower]
    if processes.way != "one":
        examples = processes.size * recipe.train.batch * recipe.train.accumulate
        yield (
            f"{launched(processes)}: {processes.size} x train.batch {recipe.train.batch} x train.accumulate "
            f"{recipe.train.accumulate} = {examples} examples a step"
        )
    yield from _idle(recipe)
    if fit is not None:
        yield f"rank {fit.rank} meets the budget with {fit.parameters:,} parameters"


#: Ends of names of files whose rows have no delimiter, or always the same one.
_NOT_DELIMITED = (".parquet", ".xlsx", ".json", ".jsonl", ".ndjson", ".txt", ".tsv")


def _idle(recipe: Recipe) -> Iterator[str]:
    """Notes on keys of `data` that have no effect here."""
    data = recipe.data
    files = [*data.sources, *([data.validation] if data.validation is not None else [])]
    if data.delimiter is not None and all(file.lower().removesuffix(".gz").endswith(_NOT_DELIMITED) for file in files):
        yield f"data.delimiter has no effect: {', '.join(files)} has none to choose"
    if data.weights is not None and len(data.sources) == 1:
        yield "data.weights has no effect with one training file, each row of which is learned once an epoch"
    if recipe.kind.rows == "labelled":
        for key, part in (("data.columns", data.columns), ("data.roles", data.roles)):
            if part != type(part)():
                yield f"{key} has no effect with task: {recipe.task}; data.text and data.label name its columns"


def of_costs(model: Any, counts: Counts) -> Iterator[str]:
    """Notes on an adapter that costs more than LoRA, in parameters or when it is served."""
    from ziggurat.export.serving import cost_of_serving
    from ziggurat.host.count import why_larger

    if counts.lora is not None and counts.adapter > counts.lora:
        yield (
            f"the adapter trains {counts.adapter:,} parameters, more than LoRA r {counts.lora_rank} on the same layers "
            f"({counts.lora:,}): {why_larger(model.peft_config['default'])}"
        )
    if (served := cost_of_serving(model)) is not None:
        yield served
