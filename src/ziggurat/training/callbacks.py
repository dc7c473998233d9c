"""What a method needs to happen while it trains."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig
from transformers import TrainerCallback

from .allocation import AdaLoRAAllocation


def callbacks_for(peft_config: Any) -> list[TrainerCallback]:
    """The callbacks that `train` adds for a PEFT config; those that ride along in every Trainer need no mention."""
    return [AdaLoRAAllocation(peft_config)] if isinstance(peft_config, AdaLoraConfig) else []
