"""Adapters on a tiny BERT, in a model and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from zoo import ZOO


@pytest.fixture
def adapted() -> Callable[[Any], PeftModel]:
    """A model with the adapter of a config, its factors random."""

    def build(config: Any) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(ZOO["bert"].build(), config)

    return build


@pytest.fixture
def saved(adapted: Callable[[Any], PeftModel], tmp_path: Path) -> Callable[[Any], Path]:
    """The folder of such an adapter."""

    def save(config: Any, name: str = "an-adapter") -> Path:
        adapted(config).save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return save
