"""The end of training, before the adapter is saved: parts without effect are dropped, active ones counted."""

from pathlib import Path
from typing import Any

from ziggurat.host.method import Method, method_of


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
