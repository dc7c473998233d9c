"""A method is two functions and a few facts. Everything else about it is derived.

    tensors(config, site)            -> {key: TensorSpec}   the tensors of a site, and which sites share them
    pair(config, site, t, context)   -> FactorPair          the paper's equation

`t` holds the tensors by the keys that `tensors` gave them. The scale is folded into B. `pair` is called in every
forward pass, with autograd, and for merging, export and analysis, where `context.training` is False.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ziggurat.errors import ConfigError, line_in, with_article
from ziggurat.host.site import Site, rank_fits
from ziggurat.host.tensors import TensorSpec, low_rank, over_experts
from ziggurat.lowrank.pair import FactorPair

Stored = Mapping[str, Tensor]


class Context(NamedTuple):
    """The inputs of `pair` besides the tensors.

    `training`: inside a forward pass in training mode. `drawn`: the result of the method's `draw` for this pass, the
    same for all sites, also where gradient checkpointing recomputes a layer; None outside training.
    """

    training: bool = False
    drawn: Any = None


#: Outside training: merging, export, analysis, inference.
EVALUATION = Context()


class Part(NamedTuple):
    """A named part of a site's update, for the analysis: a tier, a plane, a path.

    `keys`: its tensors; sites that share all of them share the part, and `group` numbers such parts. `adds`: the site's
    update is the sum of such parts; False for planes that multiply.
    """

    name: str
    pair: FactorPair
    keys: tuple[str, ...] = ("A", "B")
    group: int = 0
    adds: bool = True


class Card(NamedTuple):
    """A method's description for tables, pages and messages.

    `shown`: its name in tables. `paper`: its number at arXiv. `about`: one line for the list of methods. `citation`:
    BibTeX. `merges`: its updates can be added to weights, and exported as plain LoRA.
    """

    shown: str
    paper: str
    about: str
    citation: str = ""
    merges: bool = True


@dataclass(frozen=True, repr=False, eq=False)
class Method:
    """A method. The fields after `card` cover the cases that the two functions can't express.

    name: in lower case, its PEFT type and the prefix of its parameters.
    config: a subclass of `MethodConfig`.
    tensors, pair: see the module. `pair` is None for a method whose layer adds no pair but an update of its own.
    check: raises ConfigError for a site where the config can't work; by default where the rank is above the matrix.
    draw: draws a random value once for each forward pass in training; see `Context.drawn`.
    parts: the named parts of a site's update, for the analysis; by default the update itself.
    sites: the sites that a config adapts, if these aren't its target modules.
    reads: for a method whose layers come to share a tensor during training: key -> the shared name that a key of
        `tensors` reads now. Its config is a `MergingConfig`, which keeps this.
    acting: the sites whose update is active at present, for a method that restructures.
    needs_steps: whether training with this config needs `ziggurat.step`.
    step: the method's part of `ziggurat.step`.
    step_does: a description of `step` for errors, if it needs gradients or weights which DeepSpeed doesn't expose.
    step_fields: the fields of the config that require steps.
    callback: a TrainerCallback that every Trainer gets for this config.
    steps_in_trainer: a Trainer calls `step`; False if `callback` replaces it.
    run_state, resume: the state that a resumed run needs besides the weights, as tensors by name; restoring it.
    finish: takes the trained PeftModel before it is saved, drops parameters without effect, and returns counts of
        parameters by name.
    picture: draws the training history into a folder.
    write: writes the model with its adapter where no weight can hold the update.
    sums: the update is a sum over tensors, and `pair`, given some of them, computes their part. Tensors that all
        experts of a layer share then act on all tokens at once.
    events_file: the log that it writes beside an adapter whose structure training changed.
    older_names: regular expressions with replacements that turn a tensor's name in an older file into its current name.
    """

    name: str
    config: type[Any]
    tensors: Callable[[Any, Site], dict[str, TensorSpec]]
    pair: Callable[[Any, Site, Stored, Context], FactorPair] | None
    card: Card
    check: Callable[[Any, Site], None] | None = rank_fits
    draw: Callable[[Any], Any] | None = None
    parts: Callable[[Any, Site, Stored], list[Part]] | None = None
    sites: Callable[[Any, nn.Module, Any], dict[str, Site]] | None = None
    reads: Callable[[Any, Site], dict[str, str]] | None = None
    acting: Callable[[Any, dict[str, Site]], dict[str, Site]] | None = None
    needs_steps: Callable[[Any], bool] | None = None
    step: Callable[..., None] | None = None
    step_does: str = ""
    step_fields: tuple[str, ...] = ()
    callback: Callable[[Any], type[Any] | None] | None = None
    steps_in_trainer: bool = True
    run_state: Callable[[nn.Module], dict[str, Tensor]] | None = None
    resume: Callable[[nn.Module, Mapping[str, Tensor]], None] | None = None
    finish: Callable[[Any], dict[str, int]] | None = None
    picture: Callable[[Any, Path], None] | None = None
    write: Callable[[Any, Path], None] | None = None
    sums: bool = False
    events_file: str = ""
    older_names: tuple[tuple[str, str], ...] = ()

    @property
    def peft_type(self) -> str:
        """The name under which PEFT knows it."""
        return self.name.upper()

    @property
    def prefix(self) -> str:
        """The beginning of its parameters' names, after the path of their layer."""
        return f"{self.name}_"

    @property
    def store(self) -> str:
        """The attribute of a layer that holds the tensors, adapter by adapter."""
        return f"{self.name}_factors"

    @property
    def bank(self) -> str:
        """The attribute of the base model that holds the shared tensors. It doesn't contain the prefix."""
        return f"bank_{self.name}"

    def __reduce__(self) -> tuple[Callable[[str], "Method"], tuple[str]]:
        # Copies and pickles of a model hold no functions of the method, only its name.
        return registered, (self.peft_type,)


#: PEFT's own types whose update is a factor pair of each linear layer's own.
PAIRS_OF_PEFT = ("LORA", "ADALORA")
#: PEFT type -> method. Filled by `registry.register`.
METHODS: dict[str, Method] = {}


def needs_steps(config: Any) -> bool:
    """Whether training with this config needs `ziggurat.step`; never for another library's config or a blend."""
    method = method_of(config)
    if method is None or method.needs_steps is None or config.blended is not None:
        return False
    return method.needs_steps(config)


def does_at_steps(config: Any) -> str:
    """The use that training with this config makes of gradients or weights at its steps, in words; "" if none."""
    method = method_of(config)
    return method.step_does if method is not None and needs_steps(config) else ""


def registered(peft_type: str) -> Method:
    """The method registered under this PEFT type."""
    return METHODS[peft_type]


def kind_of(config: Any) -> str:
    """The name of the PEFT type of any adapter's config; "None" for other values."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def rank_of(config: Any) -> int | None:
    """The rank of the LoRA that any library's adapter is compared with; AdaLoRA's is the one that it begins with."""
    ranks = (getattr(config, name, None) for name in ("largest_rank", "init_r", "r"))
    return next((rank for rank in ranks if isinstance(rank, int) and rank > 0), None)


def method_of(config: Any) -> Method | None:
    """The method of an adapter's config; None for PEFT's own methods and for other values."""
    return METHODS.get(kind_of(config))


def has_pairs(config: Any) -> bool:
    """Whether the update of an adapter of this config is a factor pair at each place; False for no config."""
    method = method_of(config)
    return kind_of(config) in PAIRS_OF_PEFT if method is None else method.pair is not None


def specs_of(method: Method, config: Any, site: Site) -> dict[str, TensorSpec]:
    """The specs of `tensors` for `site`, checked and with `freeze_tiers`; for a blend, A and B of its rank there.

    Raises:
        ConfigError: a key or shared name that can't be part of a parameter's name, or a side below 0.
    """
    if config.blended is not None:
        rank = config.at_path(config.blended, site, 0)
        return low_rank(rank, site.d_in, site.d_out, True) if rank else {}
    with told_where(method, "tensors", site):
        specs = method.tensors(config, site)
    if not isinstance(specs, Mapping):
        kind = with_article(type(specs).__name__)
        raise ConfigError(f"{method.card.shown} at {site.path!r}: its `tensors` returned {kind}, no dict of specs.")
    if site.fused:
        assert site.num_experts is not None
        specs = {key: over_experts(spec, site.num_experts) for key, spec in specs.items()}
    for key, spec in specs.items():
        _check_spec(method, site, key, spec)
        leaf = spec.leaf(key)
        if not isinstance(key, str) or not key.isidentifier() or "." in leaf or method.prefix in leaf:
            raise ConfigError(
                f"{method.card.shown} calls a tensor of {site.path!r} {leaf!r}: a key is a Python name, and neither it "
                f"nor `shared` holds a dot or {method.prefix!r}."
            )
    if config.freeze_tiers is None:
        return specs
    return {key: replace(spec, trainable=spec.trainable and not config.freezes(key)) for key, spec in specs.items()}


def _check_spec(method: Method, site: Site, key: Any, spec: Any) -> None:
    """Raise ConfigError unless `spec` is a TensorSpec with a shape."""
    where = f"{method.card.shown}: tensor {key!r} of {site.path!r}"
    if not isinstance(spec, TensorSpec):
        raise ConfigError(f"{where} is {with_article(type(spec).__name__)}; `tensors` gives each key a TensorSpec.")
    if not isinstance(spec.shape, tuple) or any(not isinstance(side, Integral) or side < 0 for side in spec.shape):
        raise ConfigError(f"{where} has the shape {spec.shape!r}: a tuple of whole numbers from 0 is needed.")


@contextmanager
def told_where(method: Method, name: str, site: Site) -> Iterator[None]:
    """Turn an error of a method's own function `name`, which the block calls, into ConfigError with site and line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        kind = f"{type(error).__name__}{line_in(getattr(method, name), error)}"
        raise ConfigError(f"{method.card.shown} at {site.path!r}: its `{name}` ended in {kind}: {error}.") from error


def pair_of(method: Method, config: Any, site: Site, stored: Stored, context: Context = EVALUATION) -> FactorPair:
    """The pair of a site: the method's own, or the stored one of a blend.

    Where the site holds all experts of a layer, A (experts, rank, d_in) and B (experts, d_out, rank).
    """
    if site.fused:
        from ziggurat.host.experts.terms import expert_terms, for_each_expert, starts_of

        starts = starts_of(specs_of(method, config, site))
        return for_each_expert(expert_terms(method, config, site, starts, stored, context), site)
    if config.blended is not None:
        return FactorPair(stored["A"], stored["B"])
    assert method.pair is not None
    return method.pair(config, site, stored, context)


def parts_of(method: Method, config: Any, site: Site, stored: Stored) -> list[Part]:
    """The named parts of a site's update; the update itself where the method names none."""
    if method.parts is None or config.blended is not None:
        return [Part(method.name, pair_of(method, config, site, stored), tuple(stored))]
    return method.parts(config, site, stored)


def redirected(method: Method, config: Any, site: Site) -> dict[str, tuple[bool, str]]:
    """Key -> (True: it is shared, leaf name) of the keys that read another tensor now than `tensors` gives them."""
    if method.reads is None or config.blended is not None:
        return {}
    return {key: (True, f"{shared}:{key}") for key, shared in method.reads(config, site).items()}


def unique_specs(
    method: Method, config_at: Callable[[Site], Any], sites: Mapping[str, Site], *, fresh: bool = False
) -> dict[str, TensorSpec]:
    """Every tensor of an adapter once, by a name that sites which share it agree on.

    Raises:
        ConfigError: two sites give one name two shapes; or, of a `fresh` adapter, let it train at the one and not at
            the other.
    """
    unique: dict[str, TensorSpec] = {}
    first: dict[str, str] = {}
    for path, site in sites.items():
        for key, spec in specs_of(method, config_at(site), site).items():
            name = spec.leaf(key) if spec.shared else f"{path}.{key}"
            if name in unique and unique[name].shape != spec.shape:
                raise ConfigError(
                    f"{method.card.shown}: {first[name]!r} and {path!r} share the tensor {name!r}, but need it as "
                    f"{unique[name].shape} and {spec.shape}. Give them other ranks, adapt modules of one shape, or let "
                    "the method share by shape."
                )
            first_spec = unique.setdefault(name, spec)
            if fresh and (first_spec.trains, first_spec.seed, first_spec.up) != (spec.trains, spec.seed, spec.up):
                raise ConfigError(
                    f"{method.card.shown}: {first[name]!r} and {path!r} share the tensor {name!r}, but differ in its "
                    "`trainable`, `seed` or `up`: what a shared tensor is can't depend on the site."
                )
            first.setdefault(name, path)
    return unique


def trainable(specs: Mapping[str, TensorSpec]) -> int:
    """The number of trainable parameters in these tensors."""
    return sum(spec.size for spec in specs.values() if spec.trains)
