"""Settings of all tests. Lying here, it also puts this folder on the import path: `from zoo import ZOO`."""

import gc
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings

from fresh import Fresh

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small inputs are computed as large ones are, so that these tests try what training on long texts uses.
# tests/host/test_few_tokens.py tries the default, and runs a part of the contracts with it.
os.environ.setdefault("ZIGGURAT_FEW", "0")

# A deadline fails on a busy machine whatever the code does.
settings.register_profile("ziggurat", deadline=None)
settings.load_profile("ziggurat")


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_left_alone_by_the_collector() -> None:
    """Trainer collects garbage after each run; the libraries' millions of objects, which stay, made that half of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extension modules look at their leaks when the process ends


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    with closing(Fresh(tmp_path_factory.mktemp("fresh"))) as programs:
        yield programs


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training_tables import save_tiny_bert

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    save_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training_tables import save_tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder
