"""Progress bars and warnings of the libraries, which the commands don't show."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide progress bars ("Loading weights", "Writing model shards") in the block, then restore the user's setting.
    Warnings stay."""
    from huggingface_hub import utils as hub
    from transformers import logging

    shown, hub_hidden = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    logging.disable_progress_bar()  # transformers turns the hub's off and on with its own
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not hub_hidden:
            hub.enable_progress_bars()
        elif shown:
            hub.disable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the libraries' progress bars and warnings in the block; errors are still shown."""
    import transformers

    # Looked up, not imported, which takes a second: predicting, exporting and merging don't need it.
    datasets = cast(Any, sys.modules.get("datasets"))
    bars = bool(datasets) and not datasets.are_progress_bars_disabled()
    level = transformers.logging.get_verbosity()
    trl = logging.getLogger("trl")
    trl_level = trl.level
    if bars:
        datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    trl.setLevel(logging.ERROR)
    try:
        with without_bars():
            yield
    finally:
        trl.setLevel(trl_level)
        transformers.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
