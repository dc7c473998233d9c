"""The errors that users see. Each text names the given value, its place, the allowed values, and a remedy."""

import traceback
from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of another library's error; its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def with_article(name: str) -> str:
    """`a list`, `an int`."""
    return f"{'an' if name[:1] in tuple('AEIOUaeiou') else 'a'} {name}"


def line_in(function: Any, error: BaseException) -> str:
    """` in line 7`: the last line of the file of `function` that `error` came through; "" if there is none."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" in line {lines[-1]}" if lines else ""


class ZigguratError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(ZigguratError, ValueError):
    """A method's config cannot be applied: to itself, to the model, or beside another adapter."""


class AnatomyError(ZigguratError, ValueError):
    """No stack of layers, or no place in one, could be found for a module."""


class RecipeError(ZigguratError, ValueError):
    """A recipe has mistakes; the text lists all of them at once."""


class ExportError(ZigguratError, ValueError):
    """An adapter cannot be written in the requested form."""


class DataError(ZigguratError, ValueError):
    """A data file or hub data set cannot be read as the recipe says."""


class RewardError(ZigguratError, ValueError):
    """A reward function ended in an error, or returned something else than a number for each completion."""


class ProcessError(ZigguratError, RuntimeError):
    """A run on several processes has lost one of them."""


class StorageError(ZigguratError, OSError):
    """A file could not be written: the disk is full, read-only or forbidden."""


class DivergedError(ZigguratError, ArithmeticError):
    """Training came to a loss or a weight that is NaN or infinite; the text names the step and the last checkpoint."""


class MissingExtraError(ZigguratError, ImportError):
    """A function needs packages outside the core; the text names them and the extra that installs them."""


class VersionError(ZigguratError, ImportError, ValueError):
    """A version of PEFT, transformers or torch is installed with which this package, or one call, does not work."""


class VersionWarning(UserWarning):
    """A version of PEFT or transformers is installed that was not tested, or works only in part."""
