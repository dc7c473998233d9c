"""The layout of an adapter's paths in a model, and the linear layers of injections, checked before any change."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.base.stream import are_layers, stream_width
from ziggurat.host.base.targets import DEFAULT_TARGETS, linear_site, near_misses
from ziggurat.host.linear import features, is_adaptable
from ziggurat.host.paths.layer import check_room
from ziggurat.host.site import Site, body_name
from ziggurat.lowrank.spans import Span, check_spans
from ziggurat.methods.lor2c.config import LoR2CConfig
from ziggurat.methods.lor2c.plan import most_events
from ziggurat.methods.lor2c.structure import StackState, paths


class Layout(NamedTuple):
    """`structure`: the initial paths. `passed`: path -> site of each layer that a path passes. `sites`: those with
    tensors, which are the last layer of every span and the linear layers of injections."""

    anatomy: Anatomy
    structure: dict[str, StackState]
    passed: dict[str, Site]
    sites: dict[str, Site]

    def place(self, path: str) -> tuple[str, int]:
        """The stack of the module at `path`, and the number of its layer."""
        place = self.anatomy.position(path)
        return place.stack, place.layer


def lay_out(config: LoR2CConfig, model: nn.Module) -> Layout:
    """The layout of `config`'s paths in `model`. Changes nothing.

    Raises:
        ConfigError: spans that overlap or leave their stack, more events than paths allow, no linear layers for
            injections, a rank above the width, an unknown width, no stack of layers at all.
    """
    anatomy = Anatomy(model, layers_pattern=config.layers_pattern)
    if not anatomy.stacks:
        lists = ", ".join(
            f"{path!r} ({len(module)} members)"
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
        )
        raise ConfigError(
            f"{type(model).__name__} has no stack of layers for paths to go around; its lists are: {lists or 'none'}. "
            "If one of them holds the layers, set layers_pattern to the last part of its path; otherwise take a method "
            "that adapts linear layers."
        )
    stacks = {stack: anatomy.layers(stack) for stack in anatomy.stacks}
    layer_stacks = stacks if config.layers_pattern else are_layers(model, stacks)
    chosen = {stack: _chosen(config, layers, model) for stack, layers in stacks.items() if stack in layer_stacks}
    chosen = {stack: layers for stack, layers in chosen.items() if layers}
    _check_stacks(config, anatomy, chosen)
    layout = Layout(anatomy, {}, {}, {})
    for stack, layers in chosen.items():
        state = _state(config, stack, layers, anatomy.stacks[stack], one_of=len(chosen))
        if state.spans or state.injected:
            layout.structure[stack] = state
    if not layout.structure:
        raise ConfigError(
            "no layer is left for a path: layers_to_transform, exclude_modules, spans and injected_layers leave none "
            f"of {', '.join(f'{stack!r} ({n} layers)' for stack, n in anatomy.stacks.items())}."
        )
    for stack, state in layout.structure.items():
        _add_sites(config, layout, model, stack, state)
    _check_events(config, layout.structure)
    if config.may_inject:
        _add_linears(config, layout, model)
    return layout


def _chosen(config: LoR2CConfig, layers: Sequence[str], model: nn.Module) -> list[int]:
    """The layers of a stack that the config chooses; none of one without linear layers, such as one of convolutions."""
    if not any(is_adaptable(module) for path in layers for module in model.get_submodule(path).modules()):
        return []
    named = _named_layers(config) or range(len(layers))
    return [n for n, path in enumerate(layers) if n in named and not means(config.exclude_modules, path)]


def _named_layers(config: LoR2CConfig) -> list[int]:
    named = config.layers_to_transform
    return [named] if isinstance(named, int) else list(named or ())


def means(patterns: Any, path: str) -> bool:
    """Whether PEFT's `target_modules` or `exclude_modules` mean the module at `path`."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in patterns or ())


def _check_stacks(config: LoR2CConfig, anatomy: Anatomy, chosen: dict[str, list[int]]) -> None:
    deepest = max(anatomy.stacks.values())
    for layer in _named_layers(config):
        if not 0 <= layer < deepest:
            raise ConfigError(f"layers_to_transform: layer {layer} isn't in any stack; layers are 0 to {deepest - 1}.")
    for name in ("spans", "injected_layers"):
        value = getattr(config, name)
        for stack in value if isinstance(value, dict) else ():
            if stack not in chosen:
                raise ConfigError(f"{name} names the stack {stack!r}; there is {', '.join(map(repr, chosen))}.")


def _state(config: LoR2CConfig, stack: str, layers: Sequence[int], depth: int, one_of: int) -> StackState:
    where = f" of the stack {stack!r}"
    hint = f" A list is for every stack; with {one_of} stacks give {{stack: [...]}}." if one_of > 1 else ""
    injected = config.injected_layers
    injected = sorted((injected.get(stack, []) if isinstance(injected, dict) else injected) or [])
    if outside := [layer for layer in injected if layer not in layers]:
        raise ConfigError(
            f"injected_layers: {outside[0]} is no layer to adapt{where}, which has {depth} layers from 0.{hint}"
        )
    listed = config.spans.get(stack, []) if isinstance(config.spans, dict) else config.spans
    if listed is None:
        return StackState(tuple(Span(n, n) for n in layers if n not in injected), tuple(injected))
    try:
        spans = check_spans(listed, depth, max_length=config.max_span)
    except ConfigError as error:
        raise ConfigError(f"{error} This is{where}.{hint}") from error
    for span in spans:
        for layer in span.layers:
            if layer in injected or layer not in layers:
                rival = "injected_layers" if layer in injected else "layers_to_transform or exclude_modules"
                raise ConfigError(f"spans: {tuple(span)}{where} covers layer {layer}, which {rival} rules out.")
    return StackState(tuple(spans), tuple(injected))


def _check_not_whole(config: LoR2CConfig, path: str) -> None:
    """Raise ConfigError if PEFT trains the layer at `path` whole: it works on a copy, which no path goes around."""
    parts = path.split(".")
    outer = [".".join(parts[: end + 1]) for end in range(len(parts))]
    for name in config.modules_to_save or ():
        if any(module.endswith(name) for module in outer):
            raise ConfigError(
                f"modules_to_save: {name!r} trains layer {path!r} whole, so a path around it would learn nothing. Take "
                "it out, or leave the layer without a path (exclude_modules)."
            )


def _add_sites(config: LoR2CConfig, layout: Layout, model: nn.Module, stack: str, state: StackState) -> None:
    layers = layout.anatomy.layers(stack)
    covered = [(number, span) for span in state.spans for number in span.layers]
    widths = {number: _width(config, model, layers[number]) for number, _ in covered}
    for number, span in covered:
        path, width = layers[number], widths[number]
        check_room(model.get_submodule(path), path)
        _check_not_whole(config, path)
        if config.r > width:
            raise ConfigError(
                f"r={config.r} is above the width of the residual stream: {path!r} passes {width} values a token, so "
                f"at most rank {width} has a meaning there. Lower r."
            )
        if width != widths[span.first]:
            raise ConfigError(
                f"spans: {tuple(span)} of {stack!r} joins layers of width {widths[span.first]} and {width}; a path "
                "keeps one width. End the span where the width changes."
            )
        layer_span = Span(number, number)
        site = Site(path, body_name(model, stack), number, len(layers), "", width, width, span=layer_span)
        layout.passed[path] = site
        if number == span.last:
            layout.sites[path] = site
    if config.merges and len(set(widths.values())) > 1:
        raise ConfigError(
            f"merges={config.merges}: the layers of {stack!r} have widths {sorted(set(widths.values()))}, and paths of "
            "different widths can't merge. Choose layers of one width by layers_to_transform."
        )


def holder_of(model: nn.Module, stack: str) -> str:
    """The path of the module whose forward runs the layers: a list's owner, or the list itself if it can run."""
    while stack and isinstance(model.get_submodule(stack), nn.ModuleList):
        stack = stack.rpartition(".")[0]
    return stack


def _width(config: LoR2CConfig, model: nn.Module, layer: str) -> int:
    width = config.hidden_size or stream_width(model.get_submodule(layer), _hidden_size(model, layer))
    if config.hidden_size is not None:
        sides = {side for weight in model.get_submodule(layer).parameters() for side in weight.shape}
        if sides and config.hidden_size not in sides:
            raise ConfigError(
                f"hidden_size={config.hidden_size}, but no weight in layer {layer!r} has such a side; its sides are "
                f"{', '.join(map(str, sorted(sides)[:8]))}. Leave hidden_size out, or give the width of the residual "
                "stream."
            )
    if width is None:
        raise ConfigError(
            f"the width of the hidden states at layer {layer!r} can't be inferred: no linear layer in it reads or "
            "writes that size. Set hidden_size."
        )
    return width


def _hidden_size(model: nn.Module, layer: str) -> int | None:
    """`hidden_size` in the config of the innermost model around `layer`."""
    parts = layer.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if isinstance(size := getattr(config, "hidden_size", None), int):
            return size
    return None


def _check_events(config: LoR2CConfig, structure: dict[str, StackState]) -> None:
    count = len(paths(structure))
    merges, injections = most_events(structure, config.max_span)
    limit = "" if config.max_span is None else f" of at most max_span={config.max_span} layers together"
    if config.merges > merges:
        raise ConfigError(
            f"merges={config.merges}, but {count} paths have at most {merges} merges of neighbours{limit}. Lower it."
        )
    if config.injections > injections:
        raise ConfigError(
            f"injections={config.injections}, but only {injections} paths cover a single layer. Lower injections."
        )
    most = count - 1 if config.merges else count
    if config.merges + config.injections > most:
        raise ConfigError(
            f"merges={config.merges} and injections={config.injections}: each takes one path away, and of {count} "
            f"paths at most {most} can go. Lower one of them."
        )


def _add_linears(config: LoR2CConfig, layout: Layout, model: nn.Module) -> None:
    model_type = BaseTuner.get_model_config(model).get("model_type")  # type: ignore[arg-type]
    targets = config.target_modules or DEFAULT_TARGETS.get(model_type or "")
    if targets is None:
        raise ConfigError(
            f"injections need the query and value of a layer, and for model type {model_type!r} their names aren't "
            "known. Give them as target_modules."
        )
    needed = {(stack, layer) for stack, state in layout.structure.items() for layer in state.injected}
    if config.injections:
        needed |= {(p.stack, p.span.first) for p in paths(layout.structure) if p.span.length == 1}
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    reached = set()
    for path, module in model.named_modules():
        if not path or path.startswith(inside) or not means(targets, path) or means(config.exclude_modules, path):
            continue
        if (place := layout.place(path)) not in needed or not is_adaptable(module):
            continue
        if config.lora_r > (most := min(features(module))):
            raise ConfigError(
                f"LoRA in place of a path would have rank {config.lora_r}, but {path!r} has room for {most} at most. "
                "Set inject_r (default: r / 2)."
            )
        layout.sites[path] = linear_site(model, layout.anatomy, path, module)
        reached.add(place)
    if missing := sorted(needed - reached):
        near = near_misses(targets, model)
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise ConfigError(
            f"layer {missing[0][1]} of {missing[0][0]!r} has no linear layer called {names} to take over from its "
            f"path. Set target_modules to its query and value{f' (near: {chr(44).join(near)})' if near else ''}."
        )
