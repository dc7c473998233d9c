"""One line of bitsandbytes that its import logs on some processors, and that nobody can do anything about here."""

import logging

#: It says that an optional kernel for 4-bit weights isn't there; the usual one is taken, with the same results.
LOGGER, BEGINS = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


def hush_bitsandbytes() -> None:
    """Keep that line out of the log, and no other. PEFT imports bitsandbytes, so this must come before PEFT."""
    logging.getLogger(LOGGER).addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(BEGINS)
