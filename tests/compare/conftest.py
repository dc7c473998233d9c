"""Tiny models, written once a session."""

from pathlib import Path

import pytest
import torch
from letters import save_llama, write_tasks_data
from training_tables import save_tiny_bert


@pytest.fixture(scope="session")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT at width 64, the smallest that four-bit blocks divide."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "wide-bert"
    save_tiny_bert(folder)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(str(folder), hidden_size=64, intermediate_size=64)
    BertModel(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that knows the letters of MMLU's choices."""
    return save_llama(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of MMLU, BBH, DROP and HumanEval."""
    return write_tasks_data(tmp_path_factory.mktemp("data"))
