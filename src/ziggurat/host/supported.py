"""Which versions of the host's packages this one was tested with. The bounds are those of pyproject.toml."""

import re
from types import ModuleType

import peft
import transformers

from ziggurat.errors import VersionError

#: Package -> the first version that works, and the first above that wasn't tested.
BOUNDS = {"peft": ("0.21.2", "0.22"), "transformers": ("5.20", "6")}


def check_versions(*packages: ModuleType) -> None:
    """Raise VersionError if one of `packages` (default: PEFT and transformers) lies outside its bounds.

    A method stands on private parts of both, which move between versions: what fails far from here, or trains something
    else in silence, had better fail at once. The packages are imported already, so this takes no time.
    """
    for package in packages or (peft, transformers):
        lowest, above = BOUNDS[package.__name__]
        if not _numbers(lowest) <= _numbers(package.__version__) < _numbers(above):
            raise VersionError(
                f"{package.__name__} {package.__version__} is installed, and this version of ziggurat works with "
                f"{package.__name__}>={lowest},<{above}: pip install '{package.__name__}>={lowest},<{above}', or take "
                "a version of ziggurat that knows yours."
            )


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 21, 2) of "0.21.2.dev0"; missing parts are 0."""
    found = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return (*found, *(0 for _ in range(3 - len(found))))
