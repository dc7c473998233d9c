"""The result of a run, and writing it: the adapter's folder with the recipe and run.json."""

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ziggurat._distribution import VERSION
from ziggurat.host.bars import quiet
from ziggurat.host.method import Method, method_of
from ziggurat.recipe.recipe import to_yaml
from ziggurat.recipe.run_files import RECIPE
from ziggurat.recipe.schema import Recipe

from ..data.alpaca import TO_THE_LETTER
from ..folder import workplace
from ..folder.run_folder import RunFolder
from ..model.adapt import Counts
from ..model.base import Base, HeadSpec
from .meter import stored_bytes


@dataclass(frozen=True)
class Result:
    """The result of a run: the adapter's folder, scores by name, trainable parameters, cost.

    `before`, `after` and `guess` (of the majority class, or the mean) are scores of the validation data; `shape` is the
    shape that instruction data had; `left` counts the active parameters at the end, for methods that restructure or
    prune; `warnings` are those of `notes` that warn; `by_class` is that of `classes.by_class`; `answers` those of
    `samples.Answers`; `example` holds the texts of a validation row, `example_images` the files of its images.
    """

    folder: Path
    method: str
    metric: str
    before: dict[str, float]
    after: dict[str, float]
    guess: dict[str, float]
    counts: Counts
    seconds: float
    steps: int
    peak_mb: float | None
    step_seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    shape: str | None = None
    left: dict[str, int] = field(default_factory=dict)
    by_class: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)
    example: list[str] = field(default_factory=list)
    example_images: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


#: Fields of a result that run.json takes as they are.
_NOTED = ("shape", "metric", "before", "after", "guess", "rows", "left", "steps", "peak_mb", "step_seconds", "notes")
_NOTED += ("warnings",)


def save(
    folder: RunFolder,
    recipe: Recipe,
    base: Base,
    model: nn.Module,
    state: dict[str, Any] | None,
    spec: HeadSpec,
    result: Result,
) -> None:
    """Write the adapter, its tokenizer, recipe and run.json beside the output, whole, and put them in its place."""

    ready = workplace.new_result(folder.work)
    with quiet():
        model.save_pretrained(str(ready), **({} if state is None else {"state_dict": state}))  # type: ignore[operator]
        draw(model, ready)
        (base.processor or base.tokenizer).save_pretrained(str(ready))
    from .card import write_run_card

    write_run_card(ready, recipe, spec, result, versions())
    (ready / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
    workplace.keep_logs(folder.work, ready)
    folder.note(
        {
            "head": asdict(spec),
            "head_modules": base.head,
            **({"prompt_form": TO_THE_LETTER} if result.shape == "alpaca" else {}),
            **{name: getattr(result, name) for name in _NOTED},
            **{name: value for name in ("by_class", "answers") if (value := getattr(result, name))},
            "parameters": asdict(result.counts),
            "seconds": round(result.seconds, 2),
            "stored_bytes": stored_bytes(ready),
            "seed": recipe.seed,
            "versions": versions(),
            "history": result.history,
        },
        ready,
    )
    folder.publish(ready)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {"python": platform.python_version(), "machine": platform.platform(), "ziggurat": VERSION}
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "trl"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def settle(model: Any) -> dict[str, int]:
    """Let the adapter's method drop parts that have no effect after training. Returns counts of parameters by name.

    Outputs don't change. Empty for methods whose structure training doesn't change.
    """
    method = _method(model)
    return method.finish(model) if method is not None and method.finish is not None else {}


def draw(model: Any, folder: Path) -> None:
    """Let the method draw its training history into `folder`, if matplotlib is installed."""
    method = _method(model)
    if method is not None and method.picture is not None:
        method.picture(model, folder)


def _method(model: Any) -> Method | None:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return method_of(next(iter(configs.values()), None))
