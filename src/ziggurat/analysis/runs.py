"""Reading a finished run's folder for the report."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import MOST_RUN, own_file, read_json
from ziggurat.host.method import METHODS

from .collect import collect
from .components import Collected

RUN, RECIPE = "run.json", "recipe.yaml"


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a finished run's folder. `collected` is None if there is no readable adapter; `why` has the
    reason.

    `events`: LoR2C's merges and injections. `left`: path -> directions left of a method that prunes (LoRA², AdaLoRA),
    of `most` at the start; empty if nothing was pruned.
    """

    name: str
    values: dict[str, Any]
    recipe: str
    collected: Collected | None
    why: str
    events: list[dict[str, Any]]
    left: dict[str, int]
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
        ConfigError: there is no finished run of `ziggurat train` in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    for name in (RUN, RECIPE):
        if not (folder / name).is_file():
            inside = sorted(str(path.parent) for path in folder.glob(f"*/{RUN}"))
            hint = f" Runs are in {', '.join(inside)}." if inside else ""
            raise ConfigError(f"{folder} holds no run of `ziggurat train`: it has no {name}.{hint}")
    values = read_json(folder, RUN, MOST_RUN)
    if not isinstance(values, dict) or "after" not in values:
        raise ConfigError(f"{folder} is an unfinished run: go on with resume=true first.")
    try:
        collected, why = collect(folder), ""
    except ConfigError as error:
        collected, why = None, str(error)
    events = _events(folder)
    recipe = own_file(folder, RECIPE).read_text(encoding="utf-8")
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
    counted = all(isinstance(kept, int) or all(isinstance(k, bool) for k in kept) for kept in pattern.values())
    left = {path: kept if isinstance(kept, int) else sum(kept) for path, kept in pattern.items()} if counted else {}
    return (left, most) if sum(left.values()) < most * len(left) else ({}, most)
