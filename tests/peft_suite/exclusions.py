"""The named exclusions of `exclusions.toml`: tests that must fail, and why that is right."""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FILE = Path(__file__).with_name("exclusions.toml")
EVERY_METHOD = "every method"


@dataclass(frozen=True)
class Exclusion:
    """Tests whose id matches the pattern `test` (`*`, `?`; a bracket is itself)."""

    test: str
    reason: str

    def matches(self, test_id: str) -> bool:
        return fnmatchcase(test_id, self.test.replace("[", "[[]"))


def read_exclusions(config: str, file: Path = FILE) -> list[Exclusion]:
    """The exclusions of the method whose config class is called `config`, and those of every method."""
    sections = tomllib.loads(file.read_text(encoding="utf-8"))
    return [
        Exclusion(entry["test"], entry["reason"]) for key in (config, EVERY_METHOD) for entry in sections.get(key, [])
    ]
