"""The versions of PEFT and transformers that work, fully or in part, and the warnings at import.

The methods stand on private parts of both packages. `tested.json` holds the pairs that `.ci/versions` has run, and the
failures under each. An older version than the oldest tested one is refused; a newer one than the newest gets a warning,
because it will mostly work. A pair is *limited* if transformers itself asks for a newer PEFT than the one that is
installed: then transformers refuses seven of its methods, and everything else works.
"""

import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import transformers
from packaging.version import Version
from transformers.integrations import peft as integration

from ziggurat.errors import VersionError, VersionWarning

#: Package -> the oldest version that works; the lower bounds of pyproject.toml.
LOWEST = {"peft": "0.18.1", "transformers": "5.6", "torch": "2.6"}
#: The methods of transformers' models that ask for a version of PEFT.
ASKING = (
    "add_adapter",
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "active_adapters",
    "get_adapter_state_dict",
    "delete_adapter",
)
#: Set to 1, a version that was not tested is an error at import instead of a warning.
STRICT = "ZIGGURAT_STRICT"


class Tested(NamedTuple):
    """A set of versions under which `.ci/versions` has run, with its result."""

    name: str
    why: str
    versions: dict[str, str]
    ran: str = ""
    result: str = ""
    fails: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no test failed."""
        return not any(word in self.result for word in ("failed", "error"))


def tested_here() -> Tested | None:
    """The tested set that is installed here, patch releases left aside."""
    have = {package: Version(version).release[:2] for package, version in installed().items()}
    for row in reversed(tested()):
        if all(Version(row.versions[package]).release[:2] == release for package, release in have.items()):
            return row
    return None


@cache
def tested() -> tuple[Tested, ...]:
    """The pairs of versions that were run, oldest first."""
    rows = json.loads(Path(__file__).with_name("tested.json").read_text(encoding="utf-8"))
    return tuple(Tested(**{**row, "fails": tuple(row.get("fails", ()))}) for row in rows)


def installed() -> dict[str, str]:
    """Package -> its version here."""
    return {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def newest(package: str) -> str:
    """The newest version of `package` under which all tests passed."""
    return max((row.versions[package] for row in tested() if row.passed), key=Version)


def untested(package: str, version: str) -> bool:
    """True if `version` is of a later release (major.minor) than every tested one. Patch releases count as tested."""
    return Version(version).release[:2] > Version(newest(package)).release[:2]


def required_peft() -> str | None:
    """The version of PEFT that this transformers asks for, if the installed one is older."""
    minimum = getattr(integration, "MIN_PEFT_VERSION", None)
    return minimum if minimum is not None and Version(peft.__version__) < Version(minimum) else None


def limits() -> str | None:
    """The text about functions that fail because transformers asks for a newer PEFT; None if none does."""
    minimum = required_peft()
    if minimum is None:
        return None
    return (
        f"transformers {transformers.__version__} asks for PEFT {minimum} or newer in {len(ASKING)} methods of its "
        f"models ({', '.join(ASKING)}), and PEFT {peft.__version__} is installed: these methods fail here, with "
        "every PEFT method. All else works, get_peft_model and PeftModel.from_pretrained too. Install "
        f"peft>={minimum}, if it is out, or another transformers."
    )


def check_versions() -> None:
    """Refuse versions that are too old, warn of those that are newer than any tested or limited.

    Raises:
        VersionError: a version below LOWEST; with ZIGGURAT_STRICT=1 also one that was not tested, or a limited pair.
    """
    for package, version in installed().items():
        if Version(version).release < Version(LOWEST[package]).release:
            raise VersionError(
                f"{package} {version} is installed, and ziggurat works with {package}>={LOWEST[package]}: "
                f"pip install '{package}>={LOWEST[package]}'."
            )
    remarks = [
        f"{package} {version} is newer than {newest(package)}, the newest version that ziggurat was tested with. A "
        "fault may show far from its cause; `ziggurat doctor` shows the tested versions."
        for package, version in installed().items()
        if package != "torch" and untested(package, version)
    ]
    if (limited := limits()) is not None:
        remarks.append(limited)
        _explain()
    for text in remarks:
        if os.environ.get(STRICT, "") not in ("", "0"):
            raise VersionError(f"{text} ({STRICT} is set, so this is an error.)")
        warnings.warn(text, VersionWarning, stacklevel=3)


def _explain() -> None:
    """Replace the message of transformers' version check by ours, which names alternatives."""
    check = getattr(integration, "check_peft_version", None)
    if check is None or hasattr(check, "explained"):
        return

    def check_peft_version(min_version: str) -> None:
        try:
            check(min_version)
        except ValueError as error:
            raise VersionError(limits() or str(error)) from error

    check_peft_version.explained = True
    integration.check_peft_version = check_peft_version
