"""Tiny models and a folder of GLUE-like parquet files, in the hub's columns."""

from pathlib import Path

import pytest
from letters import save_llama, write_tasks_data
from training_tables import save_tiny_bert


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    save_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of MMLU, BBH, DROP and HumanEval."""
    return write_tasks_data(tmp_path_factory.mktemp("data"))
