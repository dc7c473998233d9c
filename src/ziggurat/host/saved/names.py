"""The names of an adapter's tensors, and their names in older versions.

In a model: `<path>.<method>_factors.<adapter>.<key>` for a tensor of one site, and
`bank_<method>.<method>_factors.<adapter>.<shared>:<key>` for a shared one; in a file the same without the adapter. No
name of a shared tensor holds the base model's prefix, so a body without a head reads it as a model with one does.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.base.unwrap import PREFIX, unwrap
from ziggurat.host.method import Method
from ziggurat.host.method_layer import layers_of
from ziggurat.host.root_hook import RootHook
from ziggurat.host.saved.sites_table import check_depth
from ziggurat.host.site import CHILD, Site, body_prefix, with_other_head
from ziggurat.host.tensors import TensorSpec

#: The form of names and config that this version writes, in adapter_config.json. 1: before it was noted there.
FORMAT = 2

T = TypeVar("T")


def current_names(state: Mapping[str, T], method: Method, model: nn.Module | None = None) -> dict[str, T]:
    """`state`, an adapter's tensors by the names in its file, renamed to the names of this version.

    With `model`, the names fit it even if the adapter was trained with another head, or without one.
    """
    if model is None:
        inner = re.compile(rf"(\.base_layer)+(?=\.{method.store}\.)")
        return {inner.sub("", _renamed(name, method, "")): tensor for name, tensor in state.items()}
    base, _ = unwrap(model)
    body = getattr(base, "base_model_prefix", "")
    prefix, paths = body_prefix(base), {path for path, _ in base.named_modules()}
    return {_fitted(_renamed(name, method, body), method, prefix, paths): tensor for name, tensor in state.items()}


def file_name(method: Method, site: Site, key: str, spec: TensorSpec) -> str:
    """The name that a site's tensor has in an adapter's file, without PEFT's prefix."""
    if spec.shared:
        return f"{method.bank}.{method.store}.{spec.leaf(key)}"
    around = f".{CHILD}" if site.span is not None else ""
    return f"{site.path}{around}.{method.store}.{key}"


def key_of(name: str) -> str:
    """The key, as the method's `tensors` has it, of a tensor by its name in a file or in a bank."""
    return re.split("[.:]", name)[-1]


class RenamesOnLoad(RootHook):
    """A hook on the base model's root that renames the tensors of every loaded state dict to the names of this version.

    PEFT before 0.21 asks a method nothing when it loads an adapter, and other loops load state dicts of whole models.
    """

    def put_on(self, root: nn.Module) -> None:
        root._register_load_state_dict_pre_hook(self, with_module=True)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        assert self.method is not None
        inside = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
        check_places(
            self.method, module, {name.rpartition(f"{self.method.store}.")[2].split(".")[0] for name in inside}
        )
        for (name, loaded_name), renamed in zip(
            inside.items(), current_names(inside, self.method, module), strict=True
        ):
            if renamed != name:
                state_dict[prefix + renamed] = state_dict.pop(loaded_name)


def check_places(method: Method, model: nn.Module, adapters: Collection[str]) -> None:
    """`check_depth` of those of `adapters`, whose tensors are being loaded into `model`, that it has."""
    sites: dict[str, dict[str, Site]] = {}
    configs: dict[str, Any] = {}
    for layer in layers_of(model, method=method):
        for adapter in set(layer.sites) & set(adapters):
            site = layer.sites[adapter]
            sites.setdefault(adapter, {})[site.path] = site
            configs[adapter] = layer.configs[adapter]
    for adapter, config in configs.items():
        check_depth(method, config, sites[adapter])


def _renamed(name: str, method: Method, body: str) -> str:
    for pattern, replacement in method.older_names:
        renamed, changes = re.subn(pattern, replacement, name, count=1)
        if changes:
            # Older versions put the whole path of the stack into the name of a shared tensor.
            front, dot, leaf = renamed.rpartition(".")
            shared = f"{method.bank}.{method.store}" in front
            return f"{front}{dot}{leaf.removeprefix(f'{body}/')}" if shared else renamed
    return name


def _fitted(name: str, method: Method, prefix: str, paths: Collection[str]) -> str:
    front, at, leaf = name.partition(f".{method.store}.")
    outer = PREFIX if front.startswith(PREFIX) else ""
    path = front.removeprefix(outer)
    if not at or path == method.bank:
        return name
    # A path is a child of its layer that is only there once the adapter is.
    place = path.removesuffix(f".{CHILD}")
    fitted = with_other_head(place, prefix, paths)
    if f"{fitted}.{method.store}" not in paths:
        # It was saved from inside another adapter of the same linear layer, which isn't there.
        fitted = with_other_head(place.replace(".base_layer", ""), prefix, paths)
    return f"{outer}{fitted}{path.removeprefix(place)}{at}{leaf}"


def check_tensors(method: Method, model: nn.Module, adapter: str, loaded: Mapping[str, Any]) -> None:
    """Raise ConfigError if `loaded` lacks tensors that `adapter` has in `model`: without them it is another adapter."""
    names = {bare_name(name) for name in loaded}
    held = {bare_name(name) for name in model.state_dict(keep_vars=True)}
    expected = [name for name in held if f".{method.store}.{adapter}." in f".{name}"]
    lacking = sorted(name for name in expected if name not in names)
    if lacking:
        raise ConfigError(
            f"adapter {adapter!r} lacks {len(lacking)} of the {len(expected)} tensors its config asks for: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}. Was the file cut, is its "
            "adapter_config.json another adapter's, or was it trained on another base model?"
        )


def bare_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    for part in ("_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name.removeprefix(PREFIX)
