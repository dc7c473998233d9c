"""A tiny Llama, and files of four tasks that it can be scored on."""

from pathlib import Path

import pytest
from letters import save_llama, write_tasks_data


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of MMLU, BBH, DROP and HumanEval."""
    return write_tasks_data(tmp_path_factory.mktemp("data"))
