"""The names of an adapter's tensors, and how older versions called them.

In a model: `<path>.<method>_factors.<adapter>.<key>` for a tensor of one site, and
`bank_<method>.<method>_factors.<adapter>.<shared>:<key>` for a shared one; in a file the same without the adapter. No
name of a shared tensor holds the base model's prefix, so a body without a head reads it as a model with one does.
"""

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from ziggurat.host.bare import unwrap
from ziggurat.host.method import Method
from ziggurat.host.site import CHILD, body_prefix, with_other_head

#: The form of names and config that this version writes, in adapter_config.json. 1: before it was noted there.
FORMAT = 2

T = TypeVar("T")


def current_names(state: Mapping[str, T], method: Method, model: nn.Module | None = None) -> dict[str, T]:
    """`state`, an adapter's tensors by the names of its file, by the names that this version gives them.

    With `model`, the names fit it also where the adapter was trained with another head, or without one.
    """
    if model is None:
        return {_renamed(name, method, ""): tensor for name, tensor in state.items()}
    base, _ = unwrap(model)
    body = getattr(base, "base_model_prefix", "")
    prefix, paths = body_prefix(base), {path for path, _ in base.named_modules()}
    return {_fitted(_renamed(name, method, body), method, prefix, paths): tensor for name, tensor in state.items()}


def _renamed(name: str, method: Method, body: str) -> str:
    for pattern, replacement in method.older_names:
        renamed, changes = re.subn(pattern, replacement, name, count=1)
        if changes:
            # Older versions put the whole path of the stack into the name of a shared tensor.
            front, at, leaf = renamed.partition(f"{method.bank}.{method.store}.")
            return f"{front}{at}{leaf.removeprefix(f'{body}/')}" if at else renamed
    return name


def _fitted(name: str, method: Method, prefix: str, paths: Collection[str]) -> str:
    front, at, leaf = name.partition(f".{method.store}.")
    outer = "base_model.model." if front.startswith("base_model.model.") else ""
    path = front.removeprefix(outer)
    if not at or path == method.bank:
        return name
    # A path is a child of its layer that is only there once the adapter is.
    place = path.removesuffix(f".{CHILD}")
    return f"{outer}{with_other_head(place, prefix, paths)}{path.removeprefix(place)}{at}{leaf}"
