"""A log line of bitsandbytes about an optional kernel that some processors don't support."""

import logging

#: The kernel for 4-bit weights is missing; the default kernel gives the same results.
LOGGER, BEGINS = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


def hush_bitsandbytes() -> None:
    """Filter this one line out of the log. PEFT imports bitsandbytes, so this must run before PEFT is imported."""
    logging.getLogger(LOGGER).addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(BEGINS)
