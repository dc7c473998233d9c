"""Spectra during training: recorded by a callback, logged like any other value, and read as arrays.

The values go through the Trainer's logging, so TensorBoard, W&B and trackio get them, checkpoints and run.json keep
them, and a resumed run continues them. Names: `spectra/<part>/s1` ... `s8`, the mean singular values from the largest
(arXiv 2503.21838, Fig. 3), and `spectra/<part>/effective_rank`, `m_eff`, `norm`, means over components.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from transformers import TrainerCallback

from . import measures
from .collect import check_readable, collect
from .components import Collected

TOP = 8
PREFIX = "spectra/"
_MEANS = ("effective_rank", "m_eff", "norm")


class SpectraCallback(TrainerCallback):
    """Records after every epoch, or every `every` optimiser steps. Made by `record_spectra`."""

    def __init__(self, trainer: Any, every: Literal["epoch"] | int, adapter: str) -> None:
        self._trainer = trainer
        self.every = every
        self.adapter = adapter

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every == "epoch":
            self._record()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._record()

    def _record(self) -> None:
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._trainer.log(scalars(collect(model, self.adapter, composed=False)))


def record_spectra(trainer: Any, every: Literal["epoch"] | int = "epoch", adapter: str = "default") -> SpectraCallback:
    """Make a transformers Trainer record the spectra of its model's adapter, after every epoch or every N steps.

    Raises:
        ConfigError: the model has no such adapter, or one that analysis can't read.
    """
    check_readable(trainer.accelerator.unwrap_model(trainer.model), adapter)
    callback = SpectraCallback(trainer, every, adapter)
    trainer.add_callback(callback)
    return callback


def scalars(collected: Collected, top: int = TOP) -> dict[str, float]:
    """The values to log for an adapter's stored parts, without those that aren't finite."""
    logged: dict[str, float] = {}
    for part in collected.stored_parts:
        for number, value in enumerate(measures.mean_spectrum(collected, part, top), 1):
            logged[f"{PREFIX}{part}/s{number}"] = float(value)
        lines = [measures.row(component) for component in collected.of(part)]
        for name in _MEANS:
            logged[f"{PREFIX}{part}/{name}"] = measures.mean(line[name] for line in lines)
    return {name: value for name, value in logged.items() if math.isfinite(value)}


def top_values(history: Iterable[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part -> (epochs (n,), singular values (top, n)) from a Trainer's `state.log_history` or run.json's history."""
    records_by_part: dict[str, list[tuple[float, dict[int, float]]]] = {}
    for line in history:
        by_part: dict[str, dict[int, float]] = {}
        for name, value in line.items():
            match = re.fullmatch(rf"{PREFIX}(.+)/s(\d+)", name)
            if match:
                by_part.setdefault(match[1], {})[int(match[2])] = float(value)
        for part, values in by_part.items():
            records_by_part.setdefault(part, []).append((float(line.get("epoch", math.nan)), values))
    result = {}
    for part, records in records_by_part.items():
        height = max(max(values) for _, values in records)
        grid = np.full((height, len(records)), np.nan)
        for column, (_, values) in enumerate(records):
            for number, value in values.items():
                grid[number - 1, column] = value
        result[part] = (np.array([epoch for epoch, _ in records]), grid)
    return result


def series(history: Iterable[Mapping[str, Any]], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part -> (epochs, values) of "effective_rank", "m_eff" or "norm"."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in history:
        for key, value in line.items():
            match = re.fullmatch(rf"{PREFIX}(.+)/{re.escape(name)}", key)
            if match:
                points.setdefault(match[1], []).append((float(line.get("epoch", math.nan)), float(value)))
    return {part: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for part, pairs in points.items()}
