"""All paths of a model, adapter by adapter: their structure, their events, and their saved state."""

from collections.abc import Mapping
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
from ziggurat.methods.lor2c.config import STRUCTURE_KEY, LoR2CConfig
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
            cover = {layer: span for span in state.spans for layer in span.layers}
            for layer, path in members.items():
                if adapter in path.covers:
                    path.covers[adapter] = cover.get(layer)
            for layer, linear_layers in self.linear_layers.get(stack, {}).items():
                for linear in (linear for linear in linear_layers if adapter in linear.leaves):
                    linear.asleep[adapter] = layer not in state.injected
        stored, active = self.parameters_of(adapter)
        for key in stored.keys() - active.keys():
            stored[key].grad = None
        if known.config.restructures:
            known.config.structure = to_json(structure, done)

    def spectra(self, adapter: str) -> dict[Path, Tensor]:
        """The singular values of B A of every path, from QR of the factors; no d x d matrix is formed."""
        spectra = {}
        for path in paths(self.known[adapter].structure):
            t = self.members[path.stack][path.span.last].stored(adapter)
            spectra[path] = singular_values(whole(t["A"]), whole(t["B"])).cpu()
        return spectra

    def restructure(
        self, step: int, total_steps: int, optimizer: Optimizer | None = None, adapter: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the events due before optimiser step `step` (from 0) of `total_steps`; returns records with all
        scores."""
        records = []
        for name in [adapter] if adapter is not None else list(self.known):
            known, config = self.known[name], self.known[name].config
            events = schedule(config.merges, config.injections, total_steps)[known.done :]
            for event in (event for event in events if event.step <= step):
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
        gone: list[Tensor] = []
        members = self.members.get(decision.stack, {})
        if decision.merged is not None:
            lower, upper = decision.merged
            below, owner = members[lower.last].stores[adapter], members[upper.last].stores[adapter]
            if decision.kept == lower:
                for name, parameter in below.named_parameters():
                    _move(parameter, owner[name], optimizer)  # type: ignore[index, arg-type]
            gone = list(below.parameters())
        elif decision.injected is not None:
            gone = list(members[decision.injected].stores[adapter].parameters())
        if optimizer is not None:
            for parameter in gone:
                optimizer.state.pop(parameter, None)
        self.set_structure(adapter, applied(known.structure, decision), known.done + 1)

    def counts(self, adapter: str) -> dict[str, int]:
        """The numbers of parameters that `adapter` stores, that its forward uses, and that train at present.

        `stored` includes parameters for later events: they are in the optimiser, but without gradient.
        """
        stored, active = self.parameters_of(adapter)
        trained = {key: p for key, p in active.items() if p.requires_grad}
        sizes = {"stored": stored, "active": active, "trained": trained}
        return {name: sum(p.numel() for p in some.values()) for name, some in sizes.items()}

    def parameters_of(self, adapter: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """All parameters of `adapter`, and those that its forward uses, by id."""
        paths = [path for members in self.members.values() for path in members.values()]
        linear_layers = [linear for at in self.linear_layers.values() for some in at.values() for linear in some]
        layers = [layer for layer in (*paths, *linear_layers) if adapter in layer.leaves]
        stores = [place.stores[adapter] for place in (self, *layers) if adapter in place.stores]
        used = [t for layer in layers if adapter in layer.adapters for t in layer.held(adapter).values()]
        return {id(p): p for store in stores for p in store.parameters()}, {id(t): t for t in used}

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
            linear_layers = self.linear_layers.get(stack, {})
            lack = [n for n in (s.last for s in state.spans) if n not in members or adapter not in members[n].leaves]
            lack += [n for n in state.injected if not any(adapter in m.leaves for m in linear_layers.get(n, ()))]
            if lack:
                raise ConfigError(
                    f"the structure of adapter {adapter!r} needs parameters at layers {sorted(lack)} of {stack!r} that "
                    "it was not built with. Give the config the same spans, injected_layers, merges and injections as "
                    "those weights were trained with."
                )

    def structures(self) -> dict[str, Any]:
        return {name: to_json(known.structure, known.done) for name, known in self.known.items()}

    def restore(self, adapter: str, plain: Any) -> None:
        self.set_structure(adapter, *from_json(plain))

    def stored_structure(self, adapter: str) -> Any:
        config = self.known[adapter].config
        return {"structure": self.structures()[adapter], "log": config.log} if config.restructures else None

    def take_structure(self, adapter: str, kept: Any) -> None:
        try:
            structure, log = kept["structure"], [dict(entry) for entry in kept["log"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the tensor {STRUCTURE_KEY!r} beside the adapter's weights isn't the JSON that LoR2C writes "
                f"({error}): the file is damaged. Save the adapter again."
            ) from error
        self.restore(adapter, structure)
        self.known[adapter].config.log = log

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
    structure = from_json(config.structure)[0] if config.structure else None
    acting_sites: dict[str, Site] = {}
    for path, site in sites.items():
        if structure is not None:
            state = _of_stack(structure, site) or StackState(())
            spans, injected = state.spans, state.injected
        else:  # training changes nothing
            spans, injected = (_of_stack(value, site) for value in (config.spans, config.injected_layers))
            spans = [site.span] if spans is None else check_spans(spans, site.num_layers)
        span = next((span for span in spans if span is not None and span.last == site.layer), None)
        if site.span is not None and span is not None:
            acting_sites[path] = replace(site, span=span)
        elif site.span is None and site.layer in (injected or ()):
            acting_sites[path] = site
    return acting_sites


def _of_stack(value: Any, site: Site) -> Any:
    """The value for the stack of `site`, of one for all stacks, or of one for each by its path in some model."""
    if not isinstance(value, dict):
        return value
    return next((at for stack, at in value.items() if f".{stack}".endswith(f".{site.stack}")), None)


def _count(value: Any) -> int:
    if not is_whole(value, 0):
        raise ValueError(f"{shown(value)} is no number of layers or events")
    return value


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
