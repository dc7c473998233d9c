"""What a method needs to happen while it trains."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig
from transformers import TrainerCallback

from .allocation import AdaLoRAAllocation


def callbacks_for(peft_config: Any) -> list[TrainerCallback]:
    """The callbacks that a method's PEFT config asks for by a method `trainer_callbacks()`; `train` adds them.

    A config that doesn't define it, such as LoraConfig, asks for none. Callbacks that a tuner lets ride along in every
    Trainer need no mention here.
    """
    if isinstance(peft_config, AdaLoraConfig):
        return [AdaLoRAAllocation(peft_config)]
    own: Any = getattr(peft_config, "trainer_callbacks", None)
    return [] if own is None else list(own())
