"""A table of reviews."""

from pathlib import Path

import pytest
from training_tables import reviews, write_csv


@pytest.fixture
def reviews_csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", reviews(48))
