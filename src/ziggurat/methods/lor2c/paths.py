"""All paths of a model, adapter by adapter: their structure, their events, and their saved state."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.host.paths.layer import PathLayer
from ziggurat.host.saved.structure import StructureBank
from ziggurat.host.site import Site
from ziggurat.host.tensors import whole
from ziggurat.lowrank.spans import check_spans
from ziggurat.lowrank.spectrum import singular_values
from ziggurat.methods.lor2c.config import STRUCTURE_KEY, LoR2CConfig
from ziggurat.methods.lor2c.layer import LoR2CLinear
from ziggurat.methods.lor2c.plan import Decision, applied, decide, schedule
from ziggurat.methods.lor2c.structure import Path, StackState, Structure, from_json, paths, to_json


@dataclass(eq=False)
class Adapter:
    """One adapter's paths: its config, its current structure, and the number of events done."""

    config: LoR2CConfig
    structure: dict[str, StackState] = field(default_factory=dict)
    done: int = 0

    def plain(self) -> dict[str, Any]:
        """The structure and the number of events done as plain lists and dicts."""
        return to_json(self.structure, self.done)


class PathBank(StructureBank):
    """Owned once at the model's root: the shared A's, and every adapter's structure, which is changed here alone."""

    other_param_names = (*StructureBank.other_param_names, "adapters")

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, Adapter] = {}
        # In tables, which torch doesn't look into: these modules are registered in their layers.
        #: Stack -> layer -> its path.
        self.members: dict[str, dict[int, PathLayer]] = {}
        #: Stack and layer -> the linear layers that can take over there.
        self.linear_layers: dict[tuple[str, int], list[LoR2CLinear]] = {}

    def set_structure(self, adapter: str, structure: Structure, done: int = 0) -> None:
        """Set the structure that the forward follows. Every change of paths goes through this function.

        Parameters that become unused lose their gradient, so that an optimiser skips them.

        Raises:
            ConfigError: `structure` needs a path or a linear layer that this model or adapter doesn't have.
        """
        current = self.adapters[adapter]
        structure = {self._stack_here(stack): state for stack, state in structure.items()}
        self._check(adapter, structure)
        current.structure, current.done = structure, done
        if current.config.restructures:
            current.config.structure = current.plain()
        spans = {(stack, layer): span for stack, span in paths(structure) for layer in span.layers}
        injected = {(stack, layer) for stack, state in structure.items() for layer in state.injected}
        for stack, members in self.members.items():
            for layer, path in members.items():
                path.covers[adapter] = spans.get((stack, layer))
        for place, linear_layers in self.linear_layers.items():
            for linear in linear_layers:
                linear.inactive[adapter] = place not in injected
        stored, active = self.parameters_of(adapter)
        for key in stored.keys() - active.keys():
            stored[key].grad = None

    def spectra(self, adapter: str) -> dict[Path, Tensor]:
        """The singular values of B A of every path, from QR of the factors; no d x d matrix is formed."""
        spectra = {}
        for path in paths(self.adapters[adapter].structure):
            t = self.members[path.stack][path.span.last].stored(adapter)
            spectra[path] = singular_values(whole(t["A"]), whole(t["B"])).cpu()
        return spectra

    def restructure(
        self, step: int, total_steps: int, optimizer: Optimizer | None = None, adapter: str | None = None
    ) -> list[dict[str, Any]]:
        """Make the events due before optimiser step `step` (from 0) of `total_steps`; returns records with all
        scores."""
        records = []
        for name in [adapter] if adapter is not None else list(self.adapters):
            current, config = self.adapters[name], self.adapters[name].config
            events = schedule(config.merges, config.injections, total_steps)[current.done :]
            for event in (event for event in events if event.step <= step):
                decision = decide(
                    event.kind, current.structure, self.spectra(name), config.criterion, config.k, config.keep,
                    config.max_span,
                )  # fmt: skip
                before = current.plain()["stacks"]
                self.carry_out(name, decision, optimizer)
                changed = {"before": before, "after": current.plain()["stacks"], "parameters": self.counts(name)}
                record = {"adapter": name, "step": step, "of": total_steps, "criterion": config.criterion}
                record |= decision.to_json() | changed
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
        current = self.adapters[adapter]
        _, before = self.parameters_of(adapter)
        if decision.merged is not None and decision.kept == decision.merged[0]:
            members = self.members[decision.stack]
            lower, joint = (members[span.last].stores[adapter] for span in decision.merged)
            for name, parameter in lower.named_parameters():
                _move(parameter, joint[name], optimizer)  # type: ignore[index, arg-type]
        self.set_structure(adapter, applied(current.structure, decision), current.done + 1)
        _, after = self.parameters_of(adapter)
        if optimizer is not None:
            for key in before.keys() - after.keys():
                optimizer.state.pop(before[key], None)

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
        layers = [path for members in self.members.values() for path in members.values()]
        layers += [linear for linear_layers in self.linear_layers.values() for linear in linear_layers]
        stores = [place.stores[adapter] for place in (self, *layers) if adapter in place.stores]
        used = [t for layer in layers if adapter in layer.adapters for t in layer.held(adapter).values()]
        return {id(p): p for store in stores for p in store.parameters()}, {id(t): t for t in used}

    def _stack_here(self, stack: str) -> str:
        """The stack's name in this model, if the structure comes from a model with another head."""
        alike = [member for member in self.members if _ends(member, stack) or _ends(stack, member)]
        return alike[0] if len(alike) == 1 else stack

    def _check(self, adapter: str, structure: Structure) -> None:
        for stack, state in structure.items():
            members = self.members.get(stack)
            if members is None:
                raise ConfigError(
                    f"the adapter's structure names the stack {stack!r}, but this model has paths in "
                    f"{', '.join(map(repr, self.members)) or 'no stack'}. Load it into the model it was trained with."
                )
            lack = [n for n in (s.last for s in state.spans) if n not in members or adapter not in members[n].leaves]
            linear_layers = {n: self.linear_layers.get((stack, n), ()) for n in state.injected}
            lack += [n for n, at in linear_layers.items() if not any(adapter in linear.leaves for linear in at)]
            if lack:
                raise ConfigError(
                    f"the structure of adapter {adapter!r} needs parameters at layers {sorted(lack)} of {stack!r} that "
                    "it was not built with. Give the config the same spans, injected_layers, merges and injections as "
                    "those weights were trained with."
                )

    def structures(self) -> dict[str, Any]:
        return {name: current.plain() for name, current in self.adapters.items()}

    def restore(self, adapter: str, plain: Any) -> None:
        self.set_structure(adapter, *from_json(plain))

    def stored_structure(self, adapter: str) -> Any:
        config = self.adapters[adapter].config
        return {"structure": self.structures()[adapter], "log": config.log} if config.restructures else None

    def take_structure(self, adapter: str, stored: Any) -> None:
        try:
            structure, log = stored["structure"], [dict(entry) for entry in stored["log"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the tensor {STRUCTURE_KEY!r} beside the adapter's weights isn't the JSON that LoR2C writes "
                f"({error}): the file is damaged. Save the adapter again."
            ) from error
        self.restore(adapter, structure)
        self.adapters[adapter].config.log = log

    def __repr__(self) -> str:
        return f"lor2c.{super().__repr__()}"


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
    return next((at for stack, at in value.items() if _ends(stack, site.stack)), None)


def _ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


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
