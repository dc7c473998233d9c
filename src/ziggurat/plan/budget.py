"""The rank that a budget of parameters pays for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.errors import ConfigError

from .closed_form import count

#: Method -> its config at rank r, for linears named as the given targets are.
BESIDE: dict[str, Callable[[int, Mapping[str, Any]], Any]] = {
    "msplora": lambda r, same: MSPLoraConfig(r=r, **same),
    "lora": lambda r, same: LoraConfig(r=r, **same),
    "dora": lambda r, same: LoraConfig(r=r, use_dora=True, **same),
    "lora2": lambda r, same: LoRA2Config(r=r, outer_rank=r, target_rank=r, **same),
    "lor2c": lambda r, same: LoR2CConfig(r=r),
    "sharelor2c": lambda r, same: LoR2CConfig(r=r, share=True),
}


def read_budget(text: str, base: int) -> int:
    """A number of parameters from "0.1%" of `base`, "300k", "1.2M", "1B" or a whole number.

    Raises:
        ConfigError: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"\s*([\d_,]*\.?\d+)\s*(%|k|m|b)?\s*", text, re.IGNORECASE)
    size = 0
    if found:
        unit = {"%": base / 100, "k": 1e3, "m": 1e6, "b": 1e9}.get((found[2] or "").lower(), 1)
        size = int(float(found[1].replace(",", "").replace("_", "")) * unit)
    if size < 1:
        raise ConfigError(
            f"budget {text!r}: a share of the model's {base:,} parameters such as 0.1%, or a number such as 300k."
        )
    return size


def largest_rank(at: Callable[[int], Any], model: nn.Module, budget: int, most: int = 1024) -> tuple[int, Any, int]:
    """The largest rank whose adapter has at most `budget` parameters, its config, and how many it has.

    `at(r)` gives the config of rank r. Ranks that a method can't take (a pyramid's r/4 must be whole) or that don't fit
    the model are passed over.

    Raises:
        ConfigError: even the smallest rank costs more.
    """
    low, high = 0, most + 1
    least: int | None = None
    best: tuple[int, Any, int] | None = None
    while high - low > 1:
        middle = (low + high) // 2
        found = next((one for r in range(middle, low, -1) if (one := _try(at, model, r))), None)
        if found is None:
            low = middle
            continue
        rank, _, cost = found
        if cost <= budget:
            best, low = (found if best is None or rank > best[0] else best), middle
        else:
            least = cost if least is None else min(least, cost)
            high = rank if rank < high else middle
    if best is None:
        raise ConfigError(
            f"a budget of {budget:,} parameters is below the smallest adapter of this kind"
            + (f", which has {least:,}" if least else "")
            + ". Raise it, or name fewer target_modules."
        )
    return best


def _try(at: Callable[[int], Any], model: nn.Module, r: int) -> tuple[int, Any, int] | None:
    try:
        config = at(r)
        return r, config, count(model, config)
    except ConfigError:
        return None
