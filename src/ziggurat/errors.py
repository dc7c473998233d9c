"""The errors users see. Each text says what was given, where, what is allowed and what to do."""


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line; of one that says nothing, its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class ZigguratError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(ZigguratError, ValueError):
    """A method's config cannot be applied: to itself, to the model, or beside another adapter."""


class AnatomyError(ZigguratError, ValueError):
    """No stack of layers, or no place in one, could be found for a module."""


class RecipeError(ZigguratError, ValueError):
    """A recipe has mistakes; the text lists all of them at once."""


class ExportError(ZigguratError, ValueError):
    """An adapter cannot be written in the form that was asked for."""


class DataError(ZigguratError, ValueError):
    """A data file or hub data set cannot be read as the recipe says."""


class RewardError(ZigguratError, ValueError):
    """A reward function ended in an error, or returned something else than a number for each completion."""


class ProcessError(ZigguratError, RuntimeError):
    """A run on several processes has lost one of them."""


class StorageError(ZigguratError, OSError):
    """A disk did not take what was to be written: full, read-only or forbidden."""


class DivergedError(ZigguratError, ArithmeticError):
    """Training came to a loss or a weight that is NaN or infinite; the text names the step and the last checkpoint."""


class MissingExtraError(ZigguratError, ImportError):
    """What was asked for needs packages outside the core; the text names them and the extra that brings them."""


class VersionError(ZigguratError, ImportError, ValueError):
    """A version of PEFT, transformers or torch is installed with which this package, or one call, does not work."""


class VersionWarning(UserWarning):
    """A version of PEFT or transformers is installed that was not tested, or works only in part."""
