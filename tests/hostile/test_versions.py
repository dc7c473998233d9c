"""A version of PEFT or transformers that wasn't tested is refused at import, with what to install."""

import importlib
import tomllib
from pathlib import Path
from types import ModuleType

import peft
import pytest
from packaging.requirements import Requirement

import ziggurat
from ziggurat.errors import VersionError
from ziggurat.host.supported import BOUNDS, check_versions

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bounds_are_those_of_the_project(name: str) -> None:
    (found,) = [Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == name]
    lowest, above = BOUNDS[name]
    assert {(s.operator, s.version) for s in found.specifier} == {(">=", lowest), ("<", above)}


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("peft", "0.21.2", True),
        ("peft", "0.21.9.dev0", True),
        ("peft", "0.21.1", False),
        ("peft", "0.9.0", False),
        ("peft", "0.22.0", False),
        ("peft", "0.22.0.dev0", False),
        ("peft", "1.0", False),
        ("transformers", "5.20.0", True),
        ("transformers", "5.99.1+cpu", True),
        ("transformers", "5.19.3", False),
        ("transformers", "4.57.6", False),
        ("transformers", "6.0.0", False),
    ],
)
def test_versions(name: str, version: str, fits: bool) -> None:
    package = ModuleType(name)
    package.__version__ = version
    if fits:
        check_versions(package)
        return
    with pytest.raises(VersionError, match=rf"{name} {version} is installed, .*pip install '{name}>="):
        check_versions(package)


def test_the_import_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(
        VersionError, match=r"peft 0\.20\.0 is installed, and this version of ziggurat works with peft>="
    ):
        importlib.reload(ziggurat)
    monkeypatch.undo()
    assert importlib.reload(ziggurat).MSPLoraConfig().r == 8
