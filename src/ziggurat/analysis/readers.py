"""From the tensors of an adapter to its components: of registered methods, and of PEFT's LoRA and AdaLoRA."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from ziggurat.errors import ConfigError
from ziggurat.host.base.anatomy import Place
from ziggurat.host.base.unwrap import PREFIX
from ziggurat.host.experts.terms import expert_pair, expert_parts, of_expert
from ziggurat.host.method import Method, pair_of, parts_of, redirected, specs_of
from ziggurat.host.saved.names import current_names, file_name
from ziggurat.host.site import Site, expert_in
from ziggurat.host.tensors import TensorSpec, drawn_again
from ziggurat.lowrank.pair import FactorPair, stack
from ziggurat.lowrank.spectrum import factored_svd

from .components import UPDATE, Component

State = Mapping[str, Tensor]
#: Path of a linear layer or transformer layer -> its place in the model.
Places = Callable[[str], Place]

_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\.(.*))?$")


def place_by_name(path: str) -> Place:
    """The place of a module by its path alone: the first number is the layer's, the path in front of it is the stack's.

    This is wrong for stages that are numbered outside the layers (Swin), which only the model tells. `num_layers` is 0:
    unknown.
    """
    match = _NUMBERED.match(path)
    if match is None:
        return Place(stack=path, layer=0, role="", num_layers=1)
    return Place(match[1], int(match[2]), match[3] or "", 0)


def components(method: Method, state: State, config: Any, sites: Mapping[str, Site]) -> Iterator[Component]:
    """The parts of a registered method's adapter, each once, and for sites with several parts the whole update.

    Raises ConfigError if `state` lacks a tensor of a site.
    """
    state = {_bare(name): tensor for name, tensor in current_names(state, method).items()}
    if method.acting is not None:
        sites = method.acting(config, dict(sites))
    alike: dict[tuple[str, ...], list[Component]] = {}
    updates: list[Component] = []
    for path, site in sites.items():
        at_site = config.at(site)
        if method.pair is None:
            continue
        specs = specs_of(method, at_site, site)
        names = _names(method, at_site, site, specs)
        stored = _stored(path, specs, names, state)
        layers = tuple(site.span.layers) if site.span is not None else (site.layer,)
        for expert in range(site.num_experts or 1) if site.fused else (None,):
            t, members = (stored, {}) if expert is None else of_expert(specs, stored, expert, site.num_experts or 1)
            parts = parts_of(method, at_site, site, t) if expert is None else expert_parts(method, at_site, site, t)
            for part in parts:
                together = all(specs[key].shared for key in part.keys)
                experts = _sharing(members, part.keys, site, expert)
                share = _in_brackets(experts, site)
                component = Component(
                    part.name,
                    site.stack_path,
                    f"{site.role}{share}",
                    layers,
                    *part.pair,
                    group=part.group,
                    adds=part.adds,
                    tensors={f"{names[key]}{share}": t[key].numel() for key in part.keys if specs[key].trains},
                    experts=experts,
                )
                # `alpha_pattern` may scale one pair otherwise in some of its layers.
                scale = str(at_site.lora_alpha) if config.alpha_pattern else ""
                where = "" if together else path
                alike.setdefault((part.name, *component.tensors, where, scale), []).append(component)
            if len(parts) > 1:
                rank = min(part.pair.A.shape[0] for part in parts if not part.adds) if not parts[0].adds else None
                pair = pair_of(method, at_site, site, t) if expert is None else expert_pair(method, at_site, site, t)
                role = site.role if expert is None else f"{site.role}[{expert}]"
                reached = _sharing({}, (), site, expert)
                updates.append(
                    Component(
                        UPDATE, site.stack_path, role, layers, *_narrowed(pair, rank), stored=False, experts=reached
                    )
                )
    yield from _once(alike.values())
    yield from updates


def _once(alike: Iterable[list[Component]]) -> Iterator[Component]:
    """Each group of equal components as one that has the layers and experts of all."""
    counted: set[tuple[str, ...]] = set()
    for same in alike:
        experts = {n for component in same for n in component.experts or ()}
        # The tensors of a pair with several scales count once.
        key = (same[0].part, *same[0].tensors)
        tensors = same[0].tensors if key not in counted else {}
        counted.add(key)
        yield replace(
            same[0],
            tensors=tensors,
            layers=tuple(sorted({n for component in same for n in component.layers})),
            experts=range(min(experts), max(experts) + 1) if experts else None,
        )


def _stored(path: str, specs: Mapping[str, TensorSpec], names: Mapping[str, str], state: State) -> dict[str, Tensor]:
    """Key -> tensor of the site at `path`; those with a seed, which no file holds, are drawn."""
    seeded = [key for key, spec in specs.items() if spec.seed is not None]
    if lacking := [name for key, name in names.items() if key not in seeded and name not in state]:
        raise ConfigError(
            f"the adapter's file lacks {lacking[0]}, which its config asks for at {path!r}. Was the file cut, or is "
            "its adapter_config.json another adapter's?"
        )
    stored = {key: state[name] for key, name in names.items() if key not in seeded}
    device = next((tensor.device for tensor in stored.values()), None)
    return stored | {key: drawn_again(specs[key], path, device) for key in seeded}


def _sharing(members: Mapping[str, range], keys: Sequence[str], site: Site, expert: int | None) -> range | None:
    """The experts that have these tensors of a site in common; without tensors, `expert` alone."""
    if members:
        return range(max(members[key].start for key in keys), min(members[key].stop for key in keys))
    return _alone(site.expert if expert is None else expert)


def _alone(expert: int | None) -> range | None:
    """One expert as those that have a component; None where there are no experts."""
    return None if expert is None else range(expert, expert + 1)


def _in_brackets(experts: range | None, site: Site) -> str:
    """Behind the role of a parameter with all experts: those that share, where they aren't all."""
    if experts is None or not site.fused or len(experts) == site.num_experts:
        return ""
    return f"[{experts.start}]" if len(experts) == 1 else f"[{experts.start}-{experts.stop - 1}]"


def _narrowed(pair: FactorPair, rank: int | None) -> FactorPair:
    """The same update in `rank` directions, if its planes limit the rank."""
    if rank is None or rank >= pair.A.shape[0] or pair.A.is_meta or not all(half.isfinite().all() for half in pair):
        return pair
    U, S, V = factored_svd(pair.A, pair.B)
    return FactorPair(V[:, :rank].T, U[:, :rank] * S[:rank])


def _names(method: Method, config: Any, site: Site, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Key -> the name that the tensor read at a site has in a file, without PEFT's prefix."""
    read = redirected(method, config, site)
    return {key: file_name(method, site, key, spec) for key, spec in specs.items()} | {
        key: f"{method.bank}.{method.store}.{leaf}" for key, (_, leaf) in read.items()
    }


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)


def lora(state: State, config: Any, places: Places) -> Iterator[Component]:
    """Plain LoRA, DoRA (the pair before the magnitude) and LoRA of embeddings and convolutions (as matrices)."""
    part = "dora" if getattr(config, "use_dora", False) else "lora"
    for path, f in _grouped(state, r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?$").items():
        if "A" not in f or "B" not in f or f["A"].flatten(1).shape[0] != f["B"].flatten(1).shape[1]:
            continue
        A, B = f["A"].flatten(1), f["B"].flatten(1)
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), path), config.lora_alpha)
        scale = alpha / (sqrt(rank) if config.use_rslora else rank)
        place = places(path)
        pair, experts = stack([FactorPair(A, B)], [scale]), _alone(expert_in(place.role))
        yield Component(part, place.stack, place.role, (place.layer,), *pair, experts=experts)


def adalora(state: State, config: Any, places: Places) -> Iterator[Component]:
    """AdaLoRA: B diag(E) A, scaled as PEFT does, by lora_alpha over the rank that training began with."""
    for path, f in _grouped(state, r"(.*)\.lora_([ABE])(?:\.weight)?$").items():
        scale = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)
        place = places(path)
        pair, experts = FactorPair(f["A"], f["B"] * (f["E"].flatten() * scale)), _alone(expert_in(place.role))
        yield Component("adalora", place.stack, place.role, (place.layer,), *pair, experts=experts)


#: PEFT type -> its reader.
READERS: dict[str, Callable[[State, Any, Places], Iterator[Component]]] = {"LORA": lora, "ADALORA": adalora}


def _grouped(state: State, pattern: str) -> dict[str, dict[str, Tensor]]:
    """Path -> leaf -> tensor, for the names that match `pattern` with these two groups."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = re.match(pattern, name)
        if match:
            groups.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor
    return groups
