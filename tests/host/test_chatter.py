"""The one line of bitsandbytes that is kept out of the log; tests/test_imports.py looks for it in a fresh process."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

import ziggurat
from ziggurat.host.chatter import BEGINS, LOGGER


def test_only_that_line_is_kept_out(caplog: pytest.LogCaptureFixture) -> None:
    assert ziggurat.__version__  # importing the package is what does it
    logger = logging.getLogger(LOGGER)
    logger.warning(f"{BEGINS} from kernels-community: %s. Please", "No module named 'kernels'")
    assert not caplog.records
    logger.warning("Failed to load something else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load something else"]


def test_bitsandbytes_still_says_it_so() -> None:
    home = find_spec("bitsandbytes")
    if home is None or home.origin is None:
        pytest.skip("bitsandbytes isn't installed")
    file = Path(home.origin).parent.joinpath(*LOGGER.split(".")[1:]).with_suffix(".py")
    text = file.read_text()
    assert f'"{BEGINS}' in text and "logger = logging.getLogger(__name__)" in text
