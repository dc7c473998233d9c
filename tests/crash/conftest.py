"""A tiny model with a table to learn from, a finished run of it, and small disks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk, make_disk
from places import Place

from ziggurat.training.loop.run import train


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def finished(place: Place) -> Path:
    """A finished run that nothing has disturbed."""
    return train(place.recipe(place.folder / "finished")).folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 4 MiB."""
    made = make_disk(tmp_path / "disk", 4)
    try:
        yield made
    finally:
        made.close()
