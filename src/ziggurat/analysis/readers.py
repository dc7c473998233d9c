"""From the tensors of an adapter to its components, one reader a method. Names and shapes are those PEFT saves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from ziggurat.host.anatomy import Place
from ziggurat.lowrank.pair import FactorPair, stack
from ziggurat.methods.lor2c.paths import from_json
from ziggurat.methods.lor2c.plan import StackState
from ziggurat.methods.msplora.pyramid import EVERY_LAYER, Tier, tier_of

from .components import UPDATE, Component

State = Mapping[str, Tensor]
#: Where the linear or layer at a path lies.
Places = Callable[[str], Place]

_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\.(.*))?$")


def place_by_name(path: str) -> Place:
    """The place of a module told from its path alone: the first number counts layers, what stands before is the stack.

    Where stages are numbered outside the layers (Swin), only the model itself knows better. `num_layers` is 0: unknown.
    """
    found = _NUMBERED.match(path)
    if found is None:
        return Place(stack=path, layer=0, role="", num_layers=1)
    return Place(found[1], int(found[2]), found[3] or "", 0)


def msplora(state: State, config: Any, places: Places, depth: Mapping[str, int]) -> Iterator[Component]:
    """Tiers, and the update of each linear. `depth`: layers of each stack; else told from the layer tier."""
    pairs: dict[str, dict[str, dict[int, FactorPair]]] = {}
    for name, A in state.items():
        if name.endswith(":A"):
            pair = name.removesuffix(":A").rpartition(".msplora_factors.")[2]
            where, _, group = pair.rpartition(":")
            tier = tier_of(pair)
            found = FactorPair(A, state[name[:-1] + "B"])
            pairs.setdefault(where, {}).setdefault(tier, {})[int(group[len(tier) :])] = found
    for where, by_tier in pairs.items():
        stack_name, role, _ = where.replace("/", ".").split(":")
        tiers: dict[str, Tier] = {tier.name: tier for tier in config.pyramid(role)}
        private = next((by_tier[t.name] for t in tiers.values() if t.groups == EVERY_LAYER and t.name in by_tier), None)
        number = depth.get(stack_name) or (max(private) + 1 if private else 0)
        layers = sorted(private) if private else list(range(number))
        for name, tier in tiers.items():
            for group, pair in sorted(by_tier.get(name, {}).items()):
                reach = tuple(n for n in layers if number and tier.group_of(n, number) == group)
                scaled = stack([pair], [tier.scale])
                yield Component(name, stack_name, role, reach, *scaled, group=group)
        for n in layers:
            used = [(t, by_tier.get(t.name, {}).get(t.group_of(n, number))) for t in tiers.values()]
            if all(pair is not None for _, pair in used):
                whole = stack([pair for _, pair in used if pair is not None], [t.scale for t, _ in used])
                yield Component(UPDATE, stack_name, role, (n,), *whole, stored=False)


def lora2(state: State, config: Any, places: Places, depth: Mapping[str, int]) -> Iterator[Component]:
    """The outer plane u U, the inner plane scale v diag(E) V (k x k), and the update of both."""
    for path, f in _grouped(state, r"(.*)\.lora2_([UVEvu])$").items():
        if not f["E"].numel():
            continue
        place = places(path)
        at = (place.stack, place.role, (place.layer,))
        v = f["v"] * (f["E"] * config.scale)
        yield Component("outer", *at, f["U"], f["u"])
        yield Component("inner", *at, f["V"], v)
        # Through the narrower of the two planes, so that the pair has no more directions than the update.
        inner_is_narrow = f["V"].shape[0] <= f["V"].shape[1]
        pair = (f["V"] @ f["U"], f["u"] @ v) if inner_is_narrow else (f["U"], f["u"] @ (v @ f["V"]))
        yield Component(UPDATE, *at, *pair, stored=False)


def lor2c(state: State, config: Any, places: Places, depth: Mapping[str, int]) -> Iterator[Component]:
    """The paths that act, over their spans, and the LoRA of layers whose path was given up.

    What an adapter stores for events that never came takes no part, and is left out.
    """
    own = _grouped(state, r"(.*)\.residual_path\.lor2c_([AB])$")
    linears = _grouped(state, r"(.*)(?<!residual_path)\.lor2c_([AB])$")
    shared = _grouped(state, r"(?:.*\.)?path_bank\.lor2c_shared\.(.*):(\d+)$")
    at = {path: places(path) for path in own}
    structure = from_json(config.structure)[0] if config.structure else _first_structure(at.values(), config)
    owners = {(place.stack, place.layer): path for path, place in at.items()}
    for stack_name, known in structure.items():
        down = next(iter(shared.get(stack_name.replace(".", "/"), {}).values()), None)
        for span in known.spans:
            f = own[owners[stack_name, span.last]]
            pair = FactorPair(f["A"] if down is None else down, f["B"])
            yield Component(
                "path", stack_name, "", tuple(span.layers), *stack([pair], [config.scale]), shared_A=down is not None
            )
    for path, f in linears.items():
        place = places(path)
        if place.stack in structure and place.layer in structure[place.stack].injected:
            pair = stack([FactorPair(f["A"], f["B"])], [config.lora_scale])
            yield Component("injected", place.stack, place.role, (place.layer,), *pair)


def lora(state: State, config: Any, places: Places, depth: Mapping[str, int]) -> Iterator[Component]:
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
        yield Component(part, place.stack, place.role, (place.layer,), *stack([FactorPair(A, B)], [scale]))


def adalora(state: State, config: Any, places: Places, depth: Mapping[str, int]) -> Iterator[Component]:
    """AdaLoRA: B diag(E) A, scaled as PEFT does, by lora_alpha over the rank that training began with."""
    for path, f in _grouped(state, r"(.*)\.lora_([ABE])(?:\.weight)?$").items():
        scale = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)
        place = places(path)
        yield Component("adalora", place.stack, place.role, (place.layer,), f["A"], f["B"] * (f["E"].flatten() * scale))


def dylora(state: State, config: Any, places: Places, depth: Mapping[str, int]) -> Iterator[Component]:
    """DyLoRA cut to the rank b that acts outside training: alpha / b times B[:, :b] A[:b]. The rest takes no part."""
    b = config.kept_rank
    for path, f in _grouped(state, r"(.*)\.dylora_([AB])$").items():
        place = places(path)
        cut = stack([FactorPair(f["A"][:b], f["B"][:, :b])], [config.scale(b)])
        yield Component("dylora", place.stack, place.role, (place.layer,), *cut)


#: PEFT type -> its reader.
READERS: dict[str, Callable[[State, Any, Places, Mapping[str, int]], Iterator[Component]]] = {
    "MSPLORA": msplora,
    "LORA2": lora2,
    "LOR2C": lor2c,
    "LORA": lora,
    "ADALORA": adalora,
    "DYLORA": dylora,
}


def _grouped(state: State, pattern: str) -> dict[str, dict[str, Tensor]]:
    """Path -> leaf -> tensor, for the names that match `pattern`, which says what is which."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = re.match(pattern, name)
        if match:
            found.setdefault(match[1].removeprefix("base_model.model."), {})[match[2]] = tensor
    return found


def _first_structure(places: Any, config: Any) -> dict[str, StackState]:
    """What a LoR2C adapter begins with, for a config that was saved before any structure was written into it."""
    structure: dict[str, StackState] = {}
    for name in dict.fromkeys(place.stack for place in places):
        layers = sorted(place.layer for place in places if place.stack == name)
        given = [
            value.get(name) if isinstance(value, dict) else value for value in (config.spans, config.injected_layers)
        ]
        injected = tuple(given[1] or ())
        spans = given[0] if given[0] is not None else [[n, n] for n in layers if n not in injected]
        plain = {"stacks": {name: {"spans": spans, "injected": list(injected)}}, "done": 0}
        structure |= from_json(plain)[0]
    return structure
