"""Versions of PEFT, transformers and torch: too old is refused, newer is warned of, limited pairs are named."""

import importlib
import tomllib
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner
from transformers.integrations import peft as integration

import ziggurat
from ziggurat.doctor.checks import machine
from ziggurat.errors import ConfigError, VersionError, VersionWarning
from ziggurat.host import supported
from zoo import ZOO

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`check_versions()` with other versions installed; the texts of its warnings."""
    monkeypatch.delenv(supported.STRICT, raising=False)
    monkeypatch.setattr(integration, "check_peft_version", integration.check_peft_version)  # put back afterwards

    def run(asked: str = "0.18.0", **versions: str) -> list[str]:
        versions_here = {name: supported.newest(name) for name in supported.LOWEST} | versions
        monkeypatch.setattr(supported, "installed", lambda: versions_here)
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", asked)
        monkeypatch.setattr(peft, "__version__", versions_here["peft"])
        monkeypatch.setattr(transformers, "__version__", versions_here["transformers"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            supported.check_versions()
        assert all(issubclass(item.category, VersionWarning) for item in caught)
        return [str(item.message) for item in caught]

    return run


@pytest.mark.parametrize("name", supported.LOWEST)
def test_the_bounds_are_those_of_the_project_and_none_is_an_upper_one(name: str) -> None:
    (requirement,) = [Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == name]
    assert {(s.operator, s.version) for s in requirement.specifier} == {(">=", supported.LOWEST[name])}


def test_no_dependency_has_an_upper_bound() -> None:
    listed = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    upper = [text for text in listed for s in Requirement(text).specifier if s.operator in ("<", "<=", "~=")]
    assert not upper


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("peft", "0.18.0"),
        ("peft", "0.9.0"),
        ("transformers", "5.5.4"),
        ("transformers", "4.57.6"),
        ("torch", "2.5.1+cpu"),
    ],
)
def test_older_versions_are_refused(check: Any, name: str, version: str) -> None:
    with pytest.raises(VersionError, match=rf"{name} {version.replace('+', '.')} is installed, .* {name}>="):
        check(**{name: version})


@pytest.mark.parametrize("name", ["peft", "transformers"])
@pytest.mark.parametrize("strict", [False, True])
def test_newer_versions_are_warned_of(check: Any, monkeypatch: pytest.MonkeyPatch, name: str, strict: bool) -> None:
    newest = Version(supported.newest(name))
    patch = f"{newest.major}.{newest.minor}.{newest.micro + 1}"
    assert check(**{name: patch}) == []
    if strict:
        monkeypatch.setenv(supported.STRICT, "1")
        with pytest.raises(VersionError, match=r"newer than .*ZIGGURAT_STRICT is set"):
            check(**{name: f"{newest.major}.{newest.minor + 1}.0"})
        return
    for version in (f"{newest.major}.{newest.minor + 1}.0.dev0", f"{newest.major + 1}.0"):
        (warning,) = check(**{name: version})
        assert warning.startswith(f"{name} {version} is newer than {supported.newest(name)}, the newest version")


def test_a_limited_pair_names_the_calls_that_fail_and_they_end_in_that_sentence(check: Any) -> None:
    (warning,) = check(asked="99.0")
    assert "asks for PEFT 99.0 or newer" in warning and "get_peft_model and PeftModel.from_pretrained too" in warning
    model: Any = ZOO["llama"].build()
    calls = {
        "add_adapter": (ziggurat.MSPLoraConfig(target_modules=["q_proj"]),),
        "set_adapter": ("default",),
        "delete_adapter": ("default",),
    }
    assert set(calls) < set(supported.ASKING)
    for name in supported.ASKING:
        assert name in warning
        with pytest.raises(VersionError, match="asks for PEFT"):
            getattr(model, name)(*calls.get(name, ()))


def test_a_transformers_that_no_longer_asks_is_no_error(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    for name in ("MIN_PEFT_VERSION", "check_peft_version"):
        monkeypatch.delattr(integration, name)
    assert supported.limits() is None
    supported._explain()


def test_transformers_asks_in_the_methods_that_are_listed() -> None:
    source = Path(str(integration.__file__)).read_text(encoding="utf-8")
    methods = [part.partition("(")[0] for part in source.split("    def ") if "\n        check_peft_version(" in part]
    assert sorted(methods) == sorted(supported.ASKING)


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (ziggurat.MSPLoraConfig(target_modules=["q_proj"], bias="all"), "bias='all'"),
        (ziggurat.LoR2CConfig(merges=1), "merges=1"),
        (ziggurat.ASLoRAConfig(target_modules=["q_proj"]), "the sharing that training changes"),
    ],
)
def test_what_an_older_peft_would_not_save_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, config: Any, lost: str
) -> None:
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict", raising=False)
    model = ZOO["llama"].build()
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=rf"^{lost}: PEFT .* saves an adapter's factors only.*peft>=0\.21"):
        peft.get_peft_model(model, config)
    assert list(model.state_dict()) == names


def test_the_import_itself_checks(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "installed", lambda: {"peft": "0.17.0"})
    with pytest.raises(VersionError, match=r"peft 0\.17\.0 is installed, and ziggurat works with peft>="):
        importlib.reload(ziggurat)
    monkeypatch.undo()
    assert importlib.reload(ziggurat).MSPLoraConfig().r == 8


def test_the_doctor_says_what_the_import_warns_of(check: Any) -> None:
    newer = "99.0.0"
    check(asked="98.0", transformers=newer)
    findings = {finding.what: finding for finding in machine()}
    assert findings["a limited pair of versions"].level == "warning"
    assert findings[f"transformers {newer}"].level == "warning"


def test_the_doctor_looks_at_processor_accelerators_disk_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    whats = [finding.what for finding in machine()]
    for begins in ("processor: ", "accelerators: ", "disk: "):
        assert any(what.startswith(begins) for what in whats)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10**9})())
    levels = {finding.what: finding.level for finding in machine() if finding.what.startswith("disk: ")}
    assert levels and set(levels.values()) == {"warning"}


def test_parameters_of_experts_need_a_peft_that_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict", raising=False)
    config = ziggurat.MSPLoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ConfigError, match=r"target_parameters: PEFT .* Install peft>=0\.21"):
        peft.get_peft_model(ZOO["llama"].build(), config)
