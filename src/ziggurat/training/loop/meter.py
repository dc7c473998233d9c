"""The cost of a run: time per step, peak memory, bytes stored."""

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

#: Steps left out at the start: caches fill, kernels are chosen.
WARM = 2


class Meter(TrainerCallback):
    """Times the optimiser steps, from the first batch of a step to the update; scoring and saving don't count."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._steps: list[float] = []

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a step, the first two left out where there are more."""
        steps = self._steps[WARM:] or self._steps
        return statistics.median(steps) if steps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.append(_now() - self._begun)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> float | None:
    """Peak memory in MiB: of the GPU since training began, else of this process. None if unknown."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights in an adapter's (or a whole model's) folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def expected_bytes(model: nn.Module, tokenizer: Any) -> int:
    """An upper bound of the bytes of a run's folder: trained weights (all, if the whole model is saved), the tokenizer,
    and a MiB for its texts."""
    whole = not hasattr(model, "peft_config")
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if whole or p.requires_grad)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return weights + (len(backend.to_str().encode()) if backend is not None else 0) + 2**20
