"""An adapter that builds on another one: it copies the shared tensors, frozen, and trains the private ones only.

`freeze_tiers` names the shared tiers, by default those that several linear layers share. Their tensors are buffers
then, and are saved with the adapter all the same.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import loaded_tensors, stored_tensors
from ziggurat.host.base.unwrap import PREFIX
from ziggurat.host.method import Method, specs_of
from ziggurat.host.method_layer import stores_at
from ziggurat.host.saved.folder import adapter_config
from ziggurat.host.saved.names import current_names, file_name, key_of
from ziggurat.host.saved.sites_table import from_table
from ziggurat.host.site import Site
from ziggurat.host.tensors import Factors, TensorSpec, tier_of, zeros
from ziggurat.host.values import NO_MATTER, shown

#: Fields that an adapter has for itself, whatever it builds on.
_OWN = NO_MATTER | {"modules_to_save", "bias", "trainable_token_indices", "structure", "peft_type"}


def inherit(config: Any) -> None:
    """Copy the fields that decide the update from the adapter in `config.from_adapter`, and set `freeze_tiers`.

    Raises:
        ConfigError: that isn't an adapter of this method, it shares nothing, or a field of `config` differs.
    """
    source: Any = adapter_config(config.from_adapter)
    if type(source) is not type(config) or source.blended is not None:
        kind = "holds a sum" if type(source) is type(config) else f"was made with {type(source).__name__}"
        raise ConfigError(
            f"from_adapter={shown(config.from_adapter)} {kind}, and this config is "
            f"{type(config).__name__}: an adapter can build on one of its own method."
        )
    different = []
    for item in fields(config):
        if item.name in _OWN or item.name in config.method.step_fields:
            continue
        value, inherited = getattr(config, item.name), getattr(source, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if value == default:
            setattr(config, item.name, inherited)
        elif value != inherited:
            different.append(f"{item.name}={shown(value)} ({shown(inherited)} there)")
    if different:
        raise ConfigError(
            f"from_adapter={shown(config.from_adapter)}: its shared tensors fit its own config, and this one "
            f"differs: {', '.join(different)}. Leave these fields out."
        )
    if config.freeze_tiers is not None and not config.freeze_tiers:
        raise ConfigError(
            f"from_adapter={shown(config.from_adapter)} with freeze_tiers=[]: nothing would be taken over. Name tiers, "
            "or tensors by their keys, or leave freeze_tiers out: then it is the shared ones."
        )
    if config.freeze_tiers is None:
        config.freeze_tiers = shared_tiers(config.method, source)
    if not config.freeze_tiers:
        raise ConfigError(
            f"from_adapter={shown(config.from_adapter)}: nothing in it is shared by several linear layers, so nothing "
            "would be taken over. Name tiers, or tensors by their keys, in freeze_tiers, or leave from_adapter out."
        )


def shared_tiers(method: Method, config: Any) -> list[str]:
    """The tiers, or keys where a tensor has no tier, that several linear layers of a saved adapter share.

    Raises:
        ConfigError: an older version saved it, without its sites.
    """
    if not config.sites:
        raise ConfigError(
            "the adapter was saved by an older version, which didn't note where it acts: load it and save it again, or "
            "name the shared tiers in freeze_tiers."
        )
    readers: dict[str, int] = defaultdict(int)
    tiers: dict[str, str] = {}
    for site in from_table(config.sites).values():
        for key, spec in specs_of(method, config.at(site), site).items():
            if spec.shared:
                readers[spec.leaf(key)] += 1
                tiers[spec.leaf(key)] = tier_of(key) or key
    return list(dict.fromkeys(tiers[leaf] for leaf, number in readers.items() if number > 1))


def check_frozen(method: Method, config: Any, sites: Mapping[str, Site], specs: Mapping[str, TensorSpec]) -> None:
    """Raise ConfigError if `freeze_tiers` names no tensor or all, or `from_adapter` lacks a frozen tensor.

    `specs`: every tensor of the adapter once.
    """
    keys = dict.fromkeys(map(key_of, specs))
    names = list(dict.fromkeys(name for key in keys for name in (tier_of(key) or key, key)))
    if unknown := [name for name in config.freeze_tiers if name not in names]:
        raise ConfigError(
            f"freeze_tiers names {shown(unknown[0])}, and the adapter has no such tier or tensor; it has "
            f"{', '.join(names)}."
        )
    if not config.inference_mode and not any(spec.trains for spec in specs.values()):
        raise ConfigError(
            f"freeze_tiers={shown(config.freeze_tiers)} is all of the adapter: nothing of it would train."
        )
    if config.from_adapter is None:
        fresh = config.stored_numbers is None and config.bank is None
        still = [key_of(name) for name, spec in specs.items() if spec.init is zeros and config.freezes(key_of(name))]
        if fresh and still:
            warnings.warn(
                f"freeze_tiers={shown(config.freeze_tiers)}: {still[0]} begins at zero and stays there: its tier adds "
                "nothing, now or later. Name the trained adapter to take it from in from_adapter.",
                stacklevel=2,
            )
        return
    held = current_names(stored_tensors(config.from_adapter), method)
    for path, site in sites.items():
        for key, spec in specs_of(method, config.at(site), site).items():
            name = PREFIX + file_name(method, site, key, spec)
            if config.freezes(key) and (name not in held or held[name].shape != spec.shape):
                mismatch = f"has it as {held[name].shape}" if name in held else "has no such tensor"
                raise ConfigError(
                    f"{path!r} needs {key} as {spec.shape} ({name}), and {config.from_adapter} {mismatch}. Was it "
                    "trained on another base model, or does freeze_tiers name a tensor that it doesn't have?"
                )


def take_over(root: nn.Module, method: Method, adapter: str, config: Any) -> None:
    """Fill the frozen tensors of a fresh adapter from the folder `config.from_adapter`, in that file's dtype."""
    state = current_names(loaded_tensors(config.from_adapter), method, root)
    for name, leaf, factors in stored_at(root, method, adapter):
        if config.freezes(key_of(leaf)) and not factors[leaf].is_meta:
            factors.put(leaf, state[PREFIX + name].to(factors[leaf].device))


def stored_at(root: nn.Module, method: Method, adapter: str) -> Iterator[tuple[str, str, Factors]]:
    """Name in a file without PEFT's prefix, leaf, and `Factors` of every tensor of `adapter` below `root`."""
    for path, stores in stores_at(root, method, adapter):
        for leaf in stores[adapter].names():
            yield f"{path}.{method.store}.{leaf}", leaf, stores[adapter]
