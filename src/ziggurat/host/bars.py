"""Progress bars of transformers and the hub, which the commands don't show."""

from collections.abc import Iterator
from contextlib import contextmanager


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
