"""Events during training: the callback of every Trainer, and the tables it prints."""

import sys
from collections.abc import Iterable
from io import StringIO
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState

from ziggurat.methods.lor2c.paths import PathBank


def restructure(
    model: nn.Module, step: int, total_steps: int, optimizer: Optimizer | None = None
) -> list[dict[str, Any]]:
    """Make the merges and injections due before optimiser step `step` (from 0) of `total_steps`, in any model with
    paths.

    To be called before every step of a custom loop. With the optimiser, a path that moves to another layer keeps its
    moments; without it, it gets those of the path that was there.
    """
    banks = [module for module in model.modules() if isinstance(module, PathBank)]
    return [record for bank in banks for record in bank.restructure(step, total_steps, optimizer)]


class RestructureCallback(TrainerCallback):
    """Makes the events of all LoR2C adapters in a training run, and prints each decision as a table."""

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if isinstance(model, nn.Module) and state.max_steps > 0:
            records = restructure(model, state.global_step, state.max_steps, kwargs.get("optimizer"))
            if state.is_world_process_zero:
                show(records)


def show(records: Iterable[dict[str, Any]]) -> None:
    """Print one table for each record of an event: all scores, the choice with its reason, and the trainable
    parameters."""
    # By the current sys.stderr: a live progress bar replaces it, to keep its line below the output.
    screen, text = Console(stderr=True), StringIO()
    console = Console(file=text, width=screen.width, force_terminal=screen.is_terminal)
    for record in records:
        console.print(_table(record))
    sys.stderr.write(text.getvalue())


def _table(record: dict[str, Any]) -> Table:
    counts = record["parameters"]
    title = f"{record['kind']} at step {record['step']} of {record['of']}: {record['reason']}"
    caption = f"parameters stored {counts['stored']:,}, active {counts['active']:,}, trained {counts['trained']:,}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("path")
    table.add_column(record["criterion"], justify="right")
    table.add_column("compared")
    table.add_column("sum of the pair" if record["kind"] == "merge" else "candidate", justify="right")
    scores, candidates = (
        [(name, f"{value:.4g}") for name, value in record[column].items()] for column in ("scores", "candidates")
    )
    for score, candidate in zip_longest(scores, candidates, fillvalue=("", "")):
        table.add_row(*score, *candidate)
    return table
