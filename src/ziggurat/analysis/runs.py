"""Reading a finished run's folder for the report."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import MOST_RUN, read_json
from ziggurat.host.method import METHODS
from ziggurat.recipe.run_files import RECIPE, read_files

from .collect import collect
from .components import Collected


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a finished run's folder. `collected` is None if there is no readable adapter; `why` has the
    reason.

    `events`: LoR2C's merges and injections. `remaining`: path -> remaining directions, of `most` at the start, for
    methods that prune (LoRA², AdaLoRA); empty if nothing was pruned.
    """

    name: str
    values: dict[str, Any]
    recipe: str
    collected: Collected | None
    why: str
    events: list[dict[str, Any]]
    remaining: dict[str, int]
    most: int

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.values.get("history") or []

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe's values by dotted key."""
        import yaml

        try:
            values = yaml.safe_load(self.recipe)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self.name}: its {RECIPE} is no YAML: {error}.") from error
        return values if isinstance(values, dict) else {}


def read_run(folder: str | Path) -> Run:
    """The run in `folder`.

    Raises:
        RecipeError: there is no finished run of `ziggurat train` in it.
    """
    folder = Path(folder)
    values, recipe = read_files(folder, "after")
    try:
        collected, why = collect(folder), ""
    except ConfigError as error:
        collected, why = None, str(error)
    events = _events(folder)
    return Run(folder.resolve().name, values, recipe, collected, why, events, *_pruned(folder, collected))


def _events(folder: Path) -> list[Any]:
    """The log of changes of the adapter's structure during training, if its method writes one."""
    for method in METHODS.values():
        if method.events_file and (folder / method.events_file).is_file():
            return read_json(folder, method.events_file, MOST_RUN)
    return []


def _pruned(folder: Path, collected: Collected | None) -> tuple[dict[str, int], int]:
    from ziggurat.host.saved.folder import adapter_config

    if collected is None:
        return {}, 0
    config: Any = adapter_config(folder)
    most = getattr(config, "init_r", None) or config.r
    pattern = getattr(config, "rank_pattern", None) or {}
    # Our methods write the number of remaining directions, AdaLoRA a mask; ranks by role are a user's choice.
    counted = all(isinstance(value, int) or all(isinstance(k, bool) for k in value) for value in pattern.values())
    remaining = (
        {path: value if isinstance(value, int) else sum(value) for path, value in pattern.items()} if counted else {}
    )
    return (remaining, most) if sum(remaining.values()) < most * len(remaining) else ({}, most)
