"""`exclusions.toml`: tests that must fail, with reasons; `methods.toml`: a method's settings for the tests."""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("exclusions.toml")
EVERY_METHOD = "every method"


@dataclass(frozen=True)
class Exclusion:
    """Tests whose id fits the pattern `test`."""

    test: str
    reason: str

    def matches(self, test_id: str) -> bool:
        return fits(test_id, self.test)


def fits(test_id: str, pattern: str) -> bool:
    """Whether `pattern` (`*`, `?`; a bracket is itself) fits the whole of `test_id`."""
    return fnmatchcase(test_id, pattern.replace("[", "[[]"))


def read_exclusions(config: str, file: Path = FILE) -> list[Exclusion]:
    """The exclusions of the method whose config class is called `config`, and those of every method."""
    sections = tomllib.loads(file.read_text(encoding="utf-8"))
    return [
        Exclusion(entry["test"], entry["reason"]) for key in (config, EVERY_METHOD) for entry in sections.get(key, [])
    ]


@dataclass(frozen=True)
class Needs:
    """What a method needs beyond a template's rows. See `methods.toml`."""

    without: tuple[str, ...] = ()
    layers: bool = False
    cannot_merge: str = ""
    variants: tuple[dict[str, Any], ...] = ()
    not_on: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    rounding: tuple[tuple[str, int, int], ...] = ()


def read_needs(config: str) -> Needs:
    """What the method whose config class is called `config` needs."""
    sections = tomllib.loads(FILE.with_name("methods.toml").read_text(encoding="utf-8"))
    listed = sections[EVERY_METHOD] | sections.get(config, {})
    return Needs(**{name: tuple(value) if isinstance(value, list) else value for name, value in listed.items()})
