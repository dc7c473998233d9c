"""The components of any adapter, from a loaded model or from a folder. The base model's weights are never needed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import loaded_tensors
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.base.targets import sites_of
from ziggurat.host.count import with_targets
from ziggurat.host.method import METHODS, has_pairs, kind_of, method_of
from ziggurat.host.plain import FROM_WEIGHTS
from ziggurat.host.saved.folder import adapter_config, load_base
from ziggurat.host.saved.sites_table import from_table
from ziggurat.host.site import Site
from ziggurat.host.tensors import whole

from .components import UPDATE, Collected, Component, span_text
from .readers import READERS, Places, components, place_by_name


def collect(source: nn.Module | str | Path, adapter: str = "default", *, composed: bool = True) -> Collected:
    """Every component of an adapter: tiers, planes, paths, plain pairs, and (`composed`) each linear layer's update.

    `source` is a model with the adapter in it, or the adapter's folder, of which only config and tensors are read; for
    a folder of an older version the base model's config, too.

    Raises:
        ConfigError: the folder is no adapter, its file is damaged, the model has no such adapter, or the method isn't
            one whose updates are factor pairs.
    """
    if isinstance(source, nn.Module):
        return _from_model(source, adapter, composed)
    folder = Path(source)
    config = adapter_config(folder)
    state = loaded_tensors(folder)
    return collect_state(state, config, source=folder.resolve().name, sites=_sites(folder, config), composed=composed)


def _sites(folder: Path, config: Any) -> Mapping[str, Site]:
    """The sites of a registered method's adapter: from its config, or for older versions from its base model."""
    method = method_of(config)
    if method is None:
        return {}
    if config.sites:
        return from_table(config.sites)
    try:
        return sites_of(method, with_targets(config, base := load_base(folder, on_meta=True), method), base)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} was saved by an older version, which didn't note where the adapter acts, so its base model's "
            f"config is needed: {error}"
        ) from error


def collect_state(
    state: Mapping[str, Tensor],
    config: Any,
    *,
    source: str = "adapter",
    places: Places = place_by_name,
    sites: Mapping[str, Site] | None = None,
    composed: bool = True,
) -> Collected:
    """The same from an adapter's state dict, as PEFT saves it, and its config.

    `sites`: path -> site, for a registered method; by default those that the config has noted.

    Raises:
        ConfigError: as `collect`.
    """
    kind, method = _kind(config, source), method_of(config)
    plain = {name: _plain(tensor) for name, tensor in state.items()}
    if method is not None:
        parts = components(method, plain, config.thawed(), sites or from_table(config.sites or {}))
    else:
        parts = READERS[kind](plain, config, places)
    chosen = [c for c in parts if composed or c.stored]
    if not chosen:
        raise ConfigError(f"{source} holds no factor pair of {kind}: its {len(plain)} tensors have other names.")
    names, stacks, roles = (
        {value: n for n, value in enumerate(dict.fromkeys(getattr(c, name) for c in chosen))}
        for name in ("part", "stack", "role")
    )
    chosen.sort(key=lambda c: (c.part == UPDATE, names[c.part], stacks[c.stack], roles[c.role], c.layers))
    return Collected(source, kind.lower(), tuple(chosen), tuple(_notes(chosen, config)))


def check_readable(model: nn.Module, adapter: str = "default") -> Any:
    """The config of an adapter of `model`.

    Raises:
        ConfigError: there is no such adapter, or its method isn't one that analysis reads.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise ConfigError(
            f"{type(model).__name__} has no adapter {adapter!r}; its adapters: {', '.join(configs) or 'none'}."
        )
    _kind(configs[adapter], adapter)
    return configs[adapter]


def _kind(config: Any, source: str) -> str:
    kind = kind_of(config)
    if not has_pairs(config):
        readable = ", ".join(m.card.shown for m in METHODS.values() if m.pair is not None)
        raise ConfigError(
            f"{source} is an adapter of PEFT method {kind}; analysis reads {readable}, LoRA (DoRA, rsLoRA, PiSSA, ... "
            "too) and AdaLoRA."
        )
    return kind


def _from_model(model: nn.Module, adapter: str, composed: bool) -> Collected:
    config = check_readable(model, adapter)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    anatomy = Anatomy(base, getattr(config, "layers_pattern", None))
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if any(tensor.is_meta for tensor in state.values()):
        raise ConfigError(f"adapter {adapter!r} lies on the meta device, without values: load its weights first.")

    method = method_of(config)
    sites = sites_of(method, with_targets(config, base, method), base) if method is not None else None
    return collect_state(state, config, source=adapter, places=anatomy.position, sites=sites, composed=composed)


def _plain(tensor: Tensor) -> Tensor:
    tensor = whole(tensor).cpu()
    return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.float()


def _notes(chosen: Iterable[Component], config: Any) -> Iterable[str]:
    stored = [c for c in chosen if c.stored]
    broken = [c for c in stored if not c.finite]
    if broken:
        yield (
            f"{len(broken)} of {len(stored)} components have NaN or infinite entries ({_some(broken)}): the training "
            "diverged or the file is damaged; their measures are NaN"
        )
    zero = [c for c in stored if c.zero]
    if zero:
        yield f"{len(zero)} of {len(stored)} components are exactly zero ({_some(zero)}): B was never trained"
    if getattr(config, "use_dora", False):
        yield "DoRA rescales each row of W + B A by a trained magnitude; the measures here are of B A before that"
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start.startswith(FROM_WEIGHTS):
        yield f"the pairs began as a part of W ({start}); the measures are of B A, which still holds that part"
    if all(len(c.layers) == 1 for c in stored) and len({(c.stack, c.layers) for c in stored}) == 1:
        yield f"the adapter reaches {span_text(stored[0].layers)} only, so there are no layers to compare"


def _some(components: list[Component]) -> str:
    return components[0].name + (", ..." if len(components) > 1 else "")
