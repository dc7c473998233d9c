"""Adapters of one base that have tensors in common: trained together, and saved as a set.

    SET/bank.safetensors                 the tensors that all share, once
    SET/NAME/adapter_config.json         with the sha256 of that file
    SET/NAME/adapter_model.safetensors   the other tensors of NAME

Each folder of a set is an adapter that loads, exports and merges by itself, as long as the bank lies beside it. Adding
one and removing a folder touch no other.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor

from ziggurat.errors import ConfigError, ExportError
from ziggurat.files.staging import written_beside
from ziggurat.files.untrusted import BANK, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, digest, loaded_tensors, own_file
from ziggurat.host.base.unwrap import PREFIX
from ziggurat.host.method import Method, method_of, specs_of
from ziggurat.host.saved.folder import adapter_config
from ziggurat.host.saved.names import current_names, file_name, key_of
from ziggurat.host.saved.sites_table import from_table
from ziggurat.host.sets.inherit import shared_tiers, stored_at
from ziggurat.host.site import Site
from ziggurat.host.tensors import is_named
from ziggurat.host.values import shown


def share(model: PeftModel, adapters: Sequence[str], tiers: Sequence[str] | None = None) -> None:
    """Make `adapters` of `model` share the tensors of `tiers`, those of the first adapter, and train all of them.

    `tiers`: names of tiers ("global", "mid"), or tensors by their keys ("A"); default: those that several linear layers
    share in the first adapter; []: none, they only train side by side. A batch then names an adapter for each sample,
    `model(**batch, adapter_names=[...])`, in training too: shared tensors learn from all samples, private tensors and
    modules_to_save from their adapter's samples. An optimiser made after this call has each tensor once, and skips
    adapters without a sample in the batch.

    Raises:
        ConfigError: there is no such adapter or tier, the adapters don't have the same tensors of these tiers, or their
            method can't train on mixed batches. Nothing is changed then.
    """
    configs: dict[str, Any] = model.peft_config
    if unknown := [name for name in adapters if name not in configs]:
        raise ConfigError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(configs)}.")
    if len(set(adapters)) < 2:
        raise ConfigError(f"adapters={shown(list(adapters))}: tensors are shared by two adapters or more.")
    first, *others = dict.fromkeys(adapters)
    method = method_of(configs[first])
    if method is None or method.pair is None or method.sites is not None:
        raise ConfigError(
            f"adapter {first!r}: its method can't train on mixed batches; methods that update linear layers can."
        )
    tiers = shared_tiers(method, configs[first]) if tiers is None else list(tiers)
    root = model.get_base_model()
    held = {name: {at: (leaf, factors) for at, leaf, factors in stored_at(root, method, name)} for name in adapters}
    common = [at for at, (leaf, _) in held[first].items() if is_named(key_of(leaf), tiers)]
    if tiers and not common:
        raise ConfigError(f"tiers={shown(tiers)}: adapter {first!r} has no such tier or tensor.")
    for name in others:
        for at in common:
            leaf, factors = held[first][at]
            if at not in held[name] or held[name][at][1][leaf].shape != factors[leaf].shape:
                raise ConfigError(
                    f"adapter {name!r} has no tensor like {at} of adapter {first!r}: give both the same targets, ranks "
                    "and tiers."
                )
    for name in others:
        for at in common:
            leaf, factors = held[first][at]
            held[name][at][1].take(leaf, factors)
    tuner: Any = model.base_model
    for module in root.modules():
        if isinstance(module, tuner.tuner_layer_cls):
            module.set_adapter([first, *others])  # type: ignore[operator]
        elif isinstance(module, AuxiliaryTrainingWrapper):  # it takes one active adapter at most
            for name in (name for name in adapters if name in module._adapters):
                module.modules_to_save[name].requires_grad_(True)  # type: ignore[index]
    tuner.active_adapter = [first, *others]
    tuner.together = frozenset(adapters)


def save_tenants(
    model: PeftModel, folder: str | Path, adapters: Sequence[str] | None = None, tiers: Sequence[str] | None = None
) -> dict[str, int]:
    """Save `adapters` of `model` (default: all) as a set, or add them to the one in `folder`; see `add_tenants`."""
    names = list(model.peft_config if adapters is None else adapters)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, selected_adapters=names)
        # PEFT puts the adapter of this name into the folder itself.
        places = {name: Path(scratch) / ("" if name == "default" else name) for name in names}
        return add_tenants(folder, places, tiers)


def add_tenants(
    folder: str | Path, adapters: Mapping[str, str | Path], tiers: Sequence[str] | None = None
) -> dict[str, int]:
    """Add adapters, name -> folder, to the set in `folder`, which is created for the first ones.

    `tiers`: the shared tiers, as in `share`; default: those that an adapter froze, or that its linear layers share.
    Other files in an adapter's folder are copied. Returns the bytes of each new weights file, by name.

    Raises:
        ConfigError: a folder is no adapter's, or an adapter's common tensors aren't those of the set, bitwise.
        ExportError: the set has an adapter of that name. Nothing is written then.
    """
    folder = Path(folder)
    for name in adapters:
        if Path(name).name != name or name.startswith(".") or name == BANK:
            raise ConfigError(f"{shown(name)} can't be the name of a folder in a set.")
        if (folder / name).exists():
            raise ExportError(f"the set {folder} has {name!r} already: choose another name, or remove that folder.")
    parts = {name: _split(Path(path), tiers) for name, path in adapters.items()}
    exists = (folder / BANK).is_file()
    bank = load_file(own_file(folder, BANK)) if exists else next(iter(parts.values())).common
    for name, part in parts.items():
        _check_same(name, part.common, bank, folder if exists else next(iter(parts)))
    if exists:
        return {name: _write(folder / name, part, digest(own_file(folder, BANK))) for name, part in parts.items()}
    with written_beside(folder) as new:
        save_file(bank, new / BANK, metadata={"format": "pt"})
        sizes = {BANK: (new / BANK).stat().st_size}
        return sizes | {name: _write(new / name, part, digest(new / BANK)) for name, part in parts.items()}


class _Parts(NamedTuple):
    """An adapter's folder, its shared tiers, and its tensors by the names of its file."""

    folder: Path
    tiers: list[str]
    common: dict[str, Tensor]
    private: dict[str, Tensor]


def _split(folder: Path, tiers: Sequence[str] | None) -> _Parts:
    config: Any = adapter_config(folder)
    method = method_of(config)
    if method is None or config.blended is not None:
        raise ConfigError(f"{folder} is no adapter of a method whose tensors can be shared ({type(config).__name__}).")
    chosen = list(tiers or config.freeze_tiers or shared_tiers(method, config))
    names = common_names(method, config, from_table(config.sites or {}), chosen)
    state = current_names(loaded_tensors(folder), method)
    if not names or not names <= state.keys():
        raise ConfigError(
            f"{folder} has nothing to share by tiers={shown(chosen)}: name the tiers that its adapters share, or "
            "tensors by their keys. (An adapter of an older version: load it and save it again.)"
        )
    private = {name: tensor for name, tensor in state.items() if name not in names}
    return _Parts(folder, chosen, {name: state[name] for name in sorted(names)}, private)


def common_names(method: Method, config: Any, sites: Mapping[str, Site], tiers: Sequence[str]) -> set[str]:
    """The names, in an adapter's file, of the tensors of these tiers."""
    return {
        PREFIX + file_name(method, site, key, spec)
        for site in sites.values()
        for key, spec in specs_of(method, config.at(site), site).items()
        if spec.seed is None and is_named(key, tiers)
    }


def _check_same(name: str, common: Mapping[str, Tensor], bank: Mapping[str, Tensor], whose: Path | str) -> None:
    different = sorted(
        at
        for at in common.keys() | bank.keys()
        if at not in common or at not in bank or not _equal(common[at], bank[at])
    )
    if different:
        raise ConfigError(
            f"adapter {name!r} doesn't build on the shared tensors of {whose}: {len(different)} differ "
            f"({different[0].removeprefix(PREFIX)}, ...). Train it on an adapter of the set (from_adapter), or "
            "together with the others (ziggurat.share)."
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _write(folder: Path, part: _Parts, sha256: str) -> int:
    with written_beside(folder) as new:
        for file in part.folder.iterdir():
            if file.is_file() and file.name != SAFETENSORS_WEIGHTS_NAME:
                shutil.copyfile(file, new / file.name)
        config = json.loads((new / CONFIG_NAME).read_text(encoding="utf-8"))
        config |= {"bank": {"sha256": sha256}, "freeze_tiers": part.tiers}
        (new / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        save_file(part.private, new / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        return (new / SAFETENSORS_WEIGHTS_NAME).stat().st_size
