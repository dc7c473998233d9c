"""The plan of a method for a model, counted without weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from ziggurat.analysis.components import UPDATE, Component
from ziggurat.analysis.readers import READERS, components, place_by_name
from ziggurat.errors import ConfigError, RecipeError
from ziggurat.export.serving import cost_of_serving
from ziggurat.host.base.anatomy import Anatomy, Place
from ziggurat.host.count import why_larger
from ziggurat.host.method import kind_of, method_of, rank_of
from ziggurat.host.saved.names import key_of
from ziggurat.host.saved.sites_table import from_table
from ziggurat.host.site import Site
from ziggurat.recipe.tasks import WRITES

from .disk import file_bytes
from .memory import Memory, Step, memory

#: Shown name -> the method's fields beside its rank. PiSSA, QLoRA and DyLoRA train as many parameters as LoRA.
BESIDE: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("msplora", "lora", "dora", "adalora", "lora2", "lor2c")},
    "sharelor2c": {"name": "lor2c", "share": True},
    **{name: {"name": name} for name in ("sharelora", "tiedlora", "loraxs", "aslora", "lily", "vera", "adapter")},
}
#: The method that is planned where none is named.
DEFAULT: dict[str, Any] = {"name": "msplora", "r": 8}
#: Methods with fixed places: around layers, after the feed-forward part.
_OWN_PLACES = ("lor2c", "sharelor2c", "adapter")
#: Names of rows of BESIDE that differ from their method's name.
_VARIANTS = {"sharelor2c": "ShareLoR2C"}
LABELS = dict.fromkeys(WRITES, "tokens") | {"classification": "classes", "multilabel": "classes"}
LABELS |= {"tokens": "tags", "regression": "values"}


def variant_name(row: str) -> str:
    """The name of a row of `BESIDE` in tables."""
    from ziggurat.recipe.methods import shown

    return _VARIANTS.get(row) or shown(row)


@dataclass(frozen=True)
class Part:
    """The components of one part on one role: how many, of what rank, each shared by how many layers at most."""

    part: str
    stack: str
    role: str
    pairs: int
    rank: int
    shared_by: int
    parameters: int


@dataclass(frozen=True)
class Beside:
    """Another method at the plan's rank (`kind` "r"), or at the largest rank within its budget ("budget")."""

    method: str
    kind: str
    r: int
    parameters: int


@dataclass(frozen=True)
class Tenants:
    """A set of `number` adapters that share the tensors of `tiers`, in parameters and bytes of weights files.

    `shared` and `bank` count once, `private` and `each` for every adapter, heads included; `alone` is the file of an
    adapter saved outside a set.
    """

    number: int
    tiers: list[str]
    shared: int
    private: int
    bank: int
    each: int
    alone: int


@dataclass(frozen=True)
class Plan:
    """The complete plan. Counts are exact; see `Memory` for its omissions.

    `adapter` counts the method's own trainable parameters, `head` those of modules trained whole; `file` is the size of
    adapter_model.safetensors in bytes.
    """

    model: str
    method: str
    r: int | None
    base: int
    adapter: int
    head: int
    file: int
    modules: list[str]
    parts: list[Part]
    beside: list[Beside]
    memory: Memory | None
    notes: list[str] = field(default_factory=list)
    tenants: Tenants | None = None


def plan(
    model: nn.Module,
    config: Any,
    *,
    name: str = "model",
    method: str = "",
    task: str | None = None,
    batch: int = 16,
    length: int = 256,
    measure_memory: bool = True,
    pair: bool = False,
    checkpointing: bool = False,
    four_bits: bool = False,
    tenants: int | None = None,
) -> Plan:
    """Count the parameters of `config` in `model`, which is on the meta device and is restored afterwards.

    For the memory: `pair`, two texts encoded separately; `checkpointing`, the layers' activations are recomputed;
    `four_bits`, the base's linear layers are NF4 (QLoRA). `tenants`: also count a set of so many adapters.

    Raises:
        ConfigError: the config doesn't fit the model, with the method's own error.
    """
    base = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    anatomy = Anatomy(model, getattr(config, "layers_pattern", None))
    notes = []
    with _adapted(model, config, f"{method or 'the method'} doesn't fit {name}") as adapted:
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        head = sum(p.numel() for n, p in trained.items() if ".modules_to_save." in n)
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        used = adapted.peft_config["default"]
        parts = _parts(state, used, anatomy, from_table(getattr(used, "sites", None) or {}))
        fleet = None if tenants is None else _tenants(tenants, used, state)
        modules = list(getattr(adapted, "targeted_module_names", None) or adapted.base_model.targeted_module_names)
        step = Step(batch, length, LABELS.get(task or ""), pair, checkpointing, four_bits)
        estimate = memory(adapted, step) if measure_memory else None
        if (served := cost_of_serving(adapted)) is not None:
            notes.append(served)
    if estimate is not None and estimate.activations is None:
        notes.append("this model's forward looks at values, so its activations can't be counted without weights")
    adapter, rank = sum(p.numel() for p in trained.values()) - head, rank_of(used)
    others, refused = _beside(model, config, rank, method, adapter)
    lora = next((other.parameters for other in others if (other.method, other.kind) == ("lora", "r")), adapter)
    if adapter > lora:
        notes.append(f"larger than LoRA r {rank} on the same layers ({lora:,}): {why_larger(used)}")
    return Plan(
        model=name,
        method=method,
        r=rank,
        base=base,
        adapter=adapter,
        head=head,
        file=file_bytes(state),
        modules=modules,
        parts=parts,
        beside=others,
        memory=estimate,
        notes=[*notes, *refused],
        tenants=fleet,
    )


def _tenants(number: int, config: Any, state: Mapping[str, Any]) -> Tenants:
    """Raises ConfigError for a method that shares nothing."""
    from ziggurat.host.sets.inherit import shared_tiers
    from ziggurat.host.sets.tenants import common_names

    method = method_of(config)
    tiers = [] if method is None else config.freeze_tiers or shared_tiers(method, config)
    if method is None or not tiers:
        raise ConfigError(
            "--tenants counts adapters that have tensors in common, and this method's linear layers share none: choose "
            "one that shares (msplora, sharelora, tiedlora, aslora), or name tensors in method.freeze_tiers."
        )
    names = common_names(method, config, from_table(config.sites or {}), tiers)
    bank = {name: tensor for name, tensor in state.items() if name in names}
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    shared, private = (sum(tensor.numel() for tensor in part.values()) for part in (bank, rest))
    return Tenants(number, tiers, shared, private, *map(file_bytes, (bank, rest, state)))


@contextmanager
def _adapted(model: nn.Module, config: Any, trouble: str) -> Iterator[Any]:
    """`model` with the adapter of `config`, on the meta device; afterwards it is as it was.

    Raises ConfigError, which begins with `trouble`, if the config doesn't fit.
    """
    trains = {id(p): p.requires_grad for p in model.parameters()}
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, _without_values(config))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"{trouble}: {error}") from error
    try:
        yield adapted
    finally:
        adapted.unload()
        for parameter in model.parameters():
            parameter.requires_grad_(trains.get(id(parameter), True))


def _without_values(config: Any) -> Any:
    """The config with an initialisation that needs no weights; the number of parameters doesn't change."""
    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config


def _parts(state: Mapping[str, Any], config: Any, anatomy: Anatomy, sites: Mapping[str, Site]) -> list[Part]:
    kind = kind_of(config)

    def places(path: str) -> Place:
        return anatomy.find(path) or place_by_name(path)

    method = method_of(config)
    if method is not None:
        read = components(method, state, config.thawed(), sites)
    elif kind in READERS:
        read = READERS[kind](state, config, places)
    else:
        return []
    groups: dict[tuple[str, str, str, int], list[Component]] = {}
    for c in read:
        if c.part != UPDATE:
            # The parts of experts of one parameter are one row.
            groups.setdefault((c.part, c.stack, c.role.partition("[")[0], c.rank), []).append(c)
    parts = []
    for (part, stack, role, rank), group in groups.items():
        tensors = {name: size for c in group for name, size in c.tensors.items()}
        if method is not None:
            tensors = {name: size for name, size in tensors.items() if not config.freezes(key_of(name))}
        parameters = sum(tensors.values()) if method is not None else sum(c.parameters for c in group)
        parts.append(Part(part, stack, role, len(group), rank, max(len(c.layers) for c in group), parameters))
    order = list(dict.fromkeys(p.part for p in parts))
    return sorted(parts, key=lambda p: (order.index(p.part), p.stack, p.role))


def _beside(
    model: nn.Module, config: Any, rank: int | None, method: str, parameters: int
) -> tuple[list[Beside], list[str]]:
    """Other methods on the same layers: at `rank`, and at the largest rank within `parameters`; by formula."""
    from ziggurat.recipe.methods import method_config, method_fields
    from ziggurat.training.sizing.budget import fit_rank, rank_fields
    from ziggurat.training.sizing.counts import count

    same = {
        name: value
        for name in ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, name, None)) is not None
    }
    others, notes = [], []
    for other, fields in BESIDE.items():
        if other == method:
            continue
        if "target_parameters" in same and (
            other in _OWN_PLACES or "target_parameters" not in method_fields(fields["name"])
        ):
            notes.append(f"{variant_name(other)} adapts no parameters of experts")
            continue
        if other not in _OWN_PLACES and (
            lacking := [name for name in same if name not in method_fields(fields["name"])]
        ):
            notes.append(f"{variant_name(other)} has no {', '.join(lacking)}")
            continue
        choice = fields if other in _OWN_PLACES or method in _OWN_PLACES else {**fields, **same}
        try:
            if rank is not None:
                number = count(model, method_config({**choice, **rank_fields(choice, rank)}))
                others.append(Beside(other, "r", rank, number))
        except (ValueError, TypeError) as error:
            notes.append(f"{other}, same r: {error}")
        try:
            fit = fit_rank(model, choice, parameters, build=False)
            others.append(Beside(other, "budget", fit.rank, fit.parameters))
        except (ConfigError, RecipeError) as error:
            notes.append(f"{other}, same budget: {error}")
    return others, notes
