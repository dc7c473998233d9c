"""All paths of a model, adapter by adapter: their structure, their events, and their saved state."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.host.saved.structure import StructureBank
from ziggurat.host.site import Site
from ziggurat.host.tensors import whole
from ziggurat.host.values import is_whole, shown
from ziggurat.lowrank.spans import check_spans
from ziggurat.lowrank.spectrum import singular_values
from ziggurat.methods.lor2c.config import LoR2CConfig
from ziggurat.methods.lor2c.layer import LoR2CLinear, LoR2CPath
from ziggurat.methods.lor2c.plan import Decision, Path, StackState, Structure, applied, decide, paths, schedule


@dataclass
class Adapter:
    """One adapter's paths: its config, its current structure, and the number of events done."""

    config: LoR2CConfig
    structure: dict[str, StackState] = field(default_factory=dict)
    done: int = 0


class PathBank(StructureBank):
    """Owned once at the model's root: the shared A's, and every adapter's structure, which is changed here alone."""

    other_param_names = (*StructureBank.other_param_names, "known")

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Adapter] = {}
        # Past nn.Module.__setattr__: these modules are registered in their layers.
        object.__setattr__(self, "_members", {})
        object.__setattr__(self, "_linear_layers", {})

    @property
    def members(self) -> dict[str, dict[int, LoR2CPath]]:
        """Stack -> layer -> its path."""
        return self.__dict__["_members"]

    @property
    def linear_layers(self) -> dict[str, dict[int, list[LoR2CLinear]]]:
        """Stack -> layer -> the linear layers that can take over there."""
        return self.__dict__["_linear_layers"]

    def set_structure(self, adapter: str, structure: Structure, done: int = 0) -> None:
        """Set the structure that the forward follows. Every change of paths goes through this function.

        Parameters that become unused lose their gradient, so that an optimiser skips them.

        Raises:
            ConfigError: `structure` needs a path or a linear that this model or adapter doesn't have.
        """
        known = self.known[adapter]
        structure = {self._stack_here(stack): state for stack, state in structure.items()}
        self._check(adapter, structure)
        known.structure, known.done = dict(structure), done
        for stack, members in self.members.items():
            state = structure.get(stack, StackState(()))
            if not state.spans:
                self._forget_shared(adapter, members.values())
            cover = {layer: span for span in state.spans for layer in span.layers}
            for layer, path in members.items():
                if adapter in path.covers:
                    path.covers[adapter] = cover.get(layer)
                    _forget_gradient(path, adapter, active=adapter in path.adapters)
            for layer, linear_layers in self.linear_layers.get(stack, {}).items():
                for linear in linear_layers:
                    if adapter in linear.leaves:
                        linear.asleep[adapter] = layer not in state.injected
                        _forget_gradient(linear, adapter, active=layer in state.injected)
        if known.config.restructures:
            known.config.structure = to_json(structure, done)

    def spectra(self, adapter: str) -> dict[Path, Tensor]:
        """The singular values of B A of every path, from QR of the factors; no d x d matrix is formed."""
        spectra = {}
        for path in paths(self.known[adapter].structure):
            t = self.members[path.stack][path.span.last].stored(adapter)
            spectra[path] = singular_values(whole(t["A"]), whole(t["B"])).cpu()
        return spectra

    def due(self, adapter: str, step: int, total_steps: int) -> list[Any]:
        """The events of `adapter` that should have happened before optimiser step `step`, and have not."""
        config = self.known[adapter].config
        events = schedule(config.merges, config.injections, total_steps)
        return [event for event in events[self.known[adapter].done :] if event.step <= step]

    def restructure(
        self, step: int, total_steps: int, optimizer: Optimizer | None = None, adapter: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the events due before optimiser step `step` (from 0) of `total_steps`; returns records with all
        scores."""
        records = []
        for name in [adapter] if adapter is not None else list(self.known):
            known, config = self.known[name], self.known[name].config
            for event in self.due(name, step, total_steps):
                decision = decide(
                    event.kind, known.structure, self.spectra(name), config.criterion, config.k, config.keep,
                    config.max_span,
                )  # fmt: skip
                before = to_json(known.structure, known.done)["stacks"]
                self.carry_out(name, decision, optimizer)
                record = {"adapter": name, "step": step, "of": total_steps, "criterion": config.criterion}
                record |= decision.to_json() | {
                    "before": before,
                    "after": to_json(known.structure, known.done)["stacks"],
                    "parameters": self.counts(name),
                }
                config.log.append(record)
                records.append(record)
        return records

    @torch.no_grad()
    def carry_out(self, adapter: str, decision: Decision, optimizer: Optimizer | None = None) -> None:
        """Carry out `decision`: move weights if a path moves, change the structure, count the event.

        A joint path belongs to the last layer of its span. If it keeps the lower path's weights, they are copied there
        with their moments in `optimizer`, so that training continues as if nothing had moved; parameters that become
        unused leave no state in the optimiser.
        """
        known = self.known[adapter]
        gone: list[nn.Parameter] = []
        if decision.merged is not None:
            lower, upper = decision.merged
            members = self.members[decision.stack]
            below, owner = members[lower.last], members[upper.last]
            if decision.kept == lower:
                for name, parameter in below.own_tensors(adapter).items():
                    _move(parameter, owner.own_tensors(adapter)[name], optimizer)
            gone = list(below.own_tensors(adapter).values())
        elif decision.injected is not None:
            gone = list(self.members[decision.stack][decision.injected].own_tensors(adapter).values())
        if optimizer is not None:
            for parameter in gone:
                optimizer.state.pop(parameter, None)
        self.set_structure(adapter, applied(known.structure, decision), known.done + 1)

    def counts(self, adapter: str) -> dict[str, int]:
        """The numbers of parameters that `adapter` stores, that its forward uses, and that train at present.

        `stored` includes parameters for later events: they are in the optimiser, but without gradient.
        """
        stored: dict[int, Tensor] = {}
        active: dict[int, Tensor] = {}
        if adapter in self.stores:
            stored |= {id(p): p for p in self.factors(adapter).parameters()}
        everyone = [path for members in self.members.values() for path in members.values()]
        linear_layers = [
            linear for layers in self.linear_layers.values() for some in layers.values() for linear in some
        ]
        for module in (*everyone, *linear_layers):
            parameters = {id(p): p for p in module.own_tensors(adapter).values()}
            stored |= parameters
            if adapter in module.adapters:
                active |= {id(p): p for p in module.stored(adapter).values()}
        trained = {key: p for key, p in active.items() if p.requires_grad}
        sizes = {"stored": stored, "active": active, "trained": trained}
        return {name: sum(p.numel() for p in some.values()) for name, some in sizes.items()}

    def _forget_shared(self, adapter: str, members: Iterable[LoR2CPath]) -> None:
        leaves = [leaf for path in members for shared, leaf in path.leaves.get(adapter, {}).values() if shared]
        for leaf in set(leaves):
            self.factors(adapter)[leaf].grad = None

    def _stack_here(self, stack: str) -> str:
        """The stack's name in this model, if the structure comes from a model with another head."""
        alike = [
            member
            for member in self.members
            if f".{member}".endswith(f".{stack}") or f".{stack}".endswith(f".{member}")
        ]
        return alike[0] if len(alike) == 1 else stack

    def _check(self, adapter: str, structure: Structure) -> None:
        for stack, state in structure.items():
            members = self.members.get(stack)
            if members is None:
                raise ConfigError(
                    f"the adapter's structure speaks of the stack {stack!r}, but this model has paths in "
                    f"{', '.join(map(repr, self.members)) or 'no stack'}. Load it into the model it was trained with."
                )
            ends = [span.last for span in state.spans]
            paired = [layer for layer in ends if layer in members and adapter in members[layer].leaves]
            linear_layers = self.linear_layers.get(stack, {})
            ready = [n for n in state.injected if any(adapter in linear.leaves for linear in linear_layers.get(n, ()))]
            if len(paired) < len(ends) or len(ready) < len(state.injected):
                lack = sorted({*ends, *state.injected} - {*paired, *ready})
                raise ConfigError(
                    f"the structure of adapter {adapter!r} needs parameters at layers {lack} of {stack!r} that it was "
                    "not built with. Give the config the same spans, injected_layers, merges and injections as those "
                    "weights were trained with."
                )

    def structures(self) -> dict[str, Any]:
        return {name: to_json(known.structure, known.done) for name, known in self.known.items()}

    def restore(self, adapter: str, plain: Any) -> None:
        self.set_structure(adapter, *from_json(plain))

    def __repr__(self) -> str:
        return f"lor2c.{super().__repr__()}"


def to_json(structure: Structure, done: int) -> dict[str, Any]:
    """A structure and the number of events done as plain lists and dicts."""
    stacks = {
        stack: {"spans": [list(span) for span in state.spans], "injected": list(state.injected)}
        for stack, state in structure.items()
    }
    return {"stacks": stacks, "done": done}


def from_json(plain: Mapping[str, Any]) -> tuple[dict[str, StackState], int]:
    """The inverse of `to_json`.

    Raises:
        ConfigError: it isn't of that form, or its spans overlap.
    """
    try:
        structure = {
            stack: StackState(
                tuple(check_spans(state["spans"], 1 + max((s[1] for s in state["spans"]), default=0))),
                tuple(_count(layer) for layer in state["injected"]),
            )
            for stack, state in plain["stacks"].items()
        }
        return structure, _count(plain["done"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"structure={shown(plain)} isn't one that LoR2C has written ({error}). Leave "
            "structure out, and say where paths lie by spans and injected_layers."
        ) from error


def acting(config: LoR2CConfig, sites: dict[str, Site]) -> dict[str, Site]:
    """The paths of the adapter's structure, with their spans, and the linear layers of past injections.

    Parameters stored for events that never came are left out.
    """
    if config.structure:
        structure = {site.stack: state for site in sites.values() if (state := _state_of(config, site)) is not None}
    else:
        structure = _first_structure(config, sites)
    acting_sites: dict[str, Site] = {}
    for path, site in sites.items():
        state = structure.get(site.stack, StackState(()))
        span = next((span for span in state.spans if span.last == site.layer), None)
        if site.span is not None and span is not None:
            acting_sites[path] = replace(site, span=span)
        elif site.span is None and site.layer in state.injected:
            acting_sites[path] = site
    return acting_sites


def _state_of(config: LoR2CConfig, site: Site) -> StackState | None:
    # The structure has the stack's whole path in the model that trained the adapter.
    structure, _ = from_json(config.structure or {})
    return next((s for stack, s in structure.items() if f".{stack}".endswith(f".{site.stack}")), None)


def _first_structure(config: LoR2CConfig, sites: dict[str, Site]) -> dict[str, StackState]:
    """The initial structure, for a config that was saved before structures were written into it."""
    structure: dict[str, StackState] = {}
    for site in sites.values():
        if site.stack in structure:
            continue
        ends = sorted(s.layer for s in sites.values() if s.stack == site.stack and s.span is not None)
        spans, injected = (
            next((v for k, v in value.items() if f".{k}".endswith(f".{site.stack}")), None)
            if isinstance(value, dict)
            else value
            for value in (config.spans, config.injected_layers)
        )
        plain = {"spans": spans if spans is not None else [[n, n] for n in ends], "injected": list(injected or ())}
        structure |= from_json({"stacks": {site.stack: plain}, "done": 0})[0]
    return structure


def _count(value: Any) -> int:
    if not is_whole(value, 0):
        raise ValueError(f"{shown(value)} is no number of layers or events")
    return value


def _forget_gradient(module: LoR2CPath | LoR2CLinear, adapter: str, active: bool) -> None:
    if not active:
        for parameter in module.own_tensors(adapter).values():
            parameter.grad = None


def _move(source: nn.Parameter, target: nn.Parameter, optimizer: Optimizer | None) -> None:
    """Copy values, and their state in the optimiser, from `source` to `target`."""
    target.copy_(source)
    if optimizer is None:
        return
    optimizer.state.pop(target, None)
    if source in optimizer.state:
        optimizer.state[target] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in optimizer.state[source].items()
        }
