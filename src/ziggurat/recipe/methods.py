"""The methods a recipe can name: all registered ones, PEFT's, and plain choices of weights.

A registered method's row follows from its card, its fields from its PEFT config.
"""

import dataclasses
import importlib
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from ziggurat import AdapterDropConfig, LoRA2Config
from ziggurat.errors import RecipeError
from ziggurat.host.method import METHODS as REGISTERED
from ziggurat.nearest import did_you_mean

#: Fields that the run sets itself, or that are of no use in a recipe.
NOT_IN_A_RECIPE = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "structure",
    "sites",
    "bank",
    "ziggurat_version",
    "ziggurat_format",
}

#: The key that determines the rank by a parameter budget; see `budget.py`.
BUDGET = "budget"

SYNONYMS = {
    "rank": "method.r",
    "alpha": "method.lora_alpha",
    "dropout": "method.lora_dropout",
    "targets": "method.target_modules",
    "target": "method.target_modules",
}


def _rank(rank: int) -> dict[str, Any]:
    return {"r": rank}


@dataclass(frozen=True)
class Method:
    """One row: either a PEFT config class, or a rule that says which of the model's own weights train.

    `config` is the class, or "module:class", imported at the first use. `fixed` are fields that define the method (DoRA
    is LoRA with use_dora). `trains` tells by a parameter's name whether it trains; the head always does. `exports` and
    `merges`: whether `ziggurat export` and `ziggurat merge` work on its adapters. `ranks` returns the config's fields
    for a rank, used to meet a parameter budget. `run` are fields of the config that only the run knows, with
    placeholders. `unread` are inherited fields that the method ignores, with the alternative. `four_bits`: the base
    weights are quantised. `shown`: its name in tables, if different from the name in recipes.
    """

    about: str
    config: str | type[Any] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    trains: Callable[[str], bool] | None = None
    exports: bool = False
    merges: bool = True
    ranks: Callable[[int], dict[str, Any]] | None = _rank
    run: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    four_bits: bool = False
    shown: str = ""

    def config_class(self) -> type[Any] | None:
        """The config's class; None for a method that trains the model's own weights.

        Raises:
            RecipeError: the installed PEFT lacks this method.
        """
        if not isinstance(self.config, str):
            return self.config
        module, _, name = self.config.partition(":")
        config = getattr(importlib.import_module(module), name, None)
        if config is None:
            from peft import __version__ as version

            raise RecipeError(f"PEFT {version} has no {name}: install a newer peft, or take another method")
        return config


TABLE: dict[str, Method] = {
    "lora2": Method(
        "two nested planes, pruned by importance (arXiv 2408.06854)",
        LoRA2Config,
        exports=True,
        ranks=lambda rank: {"r": rank, "outer_rank": rank},  # the paper's: k = r = 8 in full, k = r = 1 as the smallest
        shown="LoRA²",
    ),
    "lora": Method("low-rank updates, one pair per linear layer (arXiv 2106.09685)", "peft:LoraConfig", shown="LoRA"),
    "adalora": Method(
        "LoRA as singular values, pruned by importance (arXiv 2303.10512)",
        "peft:AdaLoraConfig",
        ranks=lambda rank: {"init_r": rank, "target_r": rank * 2 // 3},  # PEFT's default: 12 at first, 8 at the end
        # The number of steps is known when the Trainer is; `AdaLoRAAllocation` puts it in.
        run={"total_step": 2**62},
        unread={
            "r": "give init_r, the rank at the start, and target_r, the mean rank at the end",
            "rank_pattern": "the ranks come out of its allocation; take it out",
            **dict.fromkeys(("use_rslora", "alpha_pattern", "lora_bias", "use_qalora"), "take it out"),
        },
        shown="AdaLoRA",
    ),
    "pissa": Method(
        "LoRA started at the largest singular vectors (arXiv 2404.02948)",
        "peft:LoraConfig",
        {"init_lora_weights": "pissa"},
        shown="PiSSA",
    ),
    "qlora": Method(
        "LoRA on a base in 4 bits, NF4 (arXiv 2305.14314)",
        "peft:LoraConfig",
        merges=False,
        four_bits=True,
        shown="QLoRA",
    ),
    "dora": Method(
        "LoRA with a trained magnitude (arXiv 2402.09353)", "peft:LoraConfig", {"use_dora": True}, shown="DoRA"
    ),
    "vera": Method("shared random factors, trained vectors (arXiv 2310.11454)", "peft:VeraConfig", shown="VeRA"),
    "lily": Method("low-rank updates with shared experts (arXiv 2407.09946)", "peft:LilyConfig", shown="Lily"),
    "adapter": Method(
        "bottlenecks after the layers' feed-forward part, with AdapterDrop by its fields (arXiv 2010.11918)",
        AdapterDropConfig,
        merges=False,
        shown="bottlenecks",
    ),
    "bitfit": Method(
        "the biases of the model (arXiv 2106.10199)",
        trains=lambda name: name.endswith("bias"),
        merges=False,
        ranks=None,
    ),
    "head": Method("the head alone; the model stays as it is", trains=lambda name: False, merges=False, ranks=None),
    "full": Method("every weight of the model", trains=lambda name: True, merges=False, ranks=None),
}


class Methods(Mapping[str, Method]):
    """The table's rows, and a row for every other registered method."""

    def __getitem__(self, name: str) -> Method:
        return self._rows()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())

    @staticmethod
    def _rows() -> dict[str, Method]:
        named = {row.config for row in TABLE.values()}
        rows = {
            method.name: Method(
                f"{method.card.about} (arXiv {method.card.paper})" if method.card.paper else method.card.about,
                method.config,
                exports=method.card.merges,
                merges=method.card.merges,
                shown=method.card.shown,
            )
            for method in REGISTERED.values()
            if method.config not in named
        }
        return {**rows, **TABLE}


METHODS = Methods()


def shown(name: str) -> str:
    """The method's name in tables."""
    row = METHODS.get(name)
    return row.shown if row is not None and row.shown else name


def method_fields(name: str) -> dict[str, Any]:
    """Field name -> type hint of the method's config, without fields that the run sets or the method ignores."""
    method = METHODS[name]
    cls = method.config_class()
    if cls is None:
        return {}
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):
        hints = {}
    return {
        item.name: hints.get(item.name, Any)
        for item in dataclasses.fields(cls)
        if item.init and item.name not in {*NOT_IN_A_RECIPE, *method.fixed, *method.run, *method.unread}
    }


def method_problems(choice: dict[str, Any]) -> list[str]:
    """All mistakes in `method.*`: in the name, in each field, and the config's own errors."""
    from .values import explain

    if "name" not in choice:
        return ["method.name: missing; one of " + ", ".join(METHODS)]
    name = choice["name"]
    if not isinstance(name, str) or name not in METHODS:
        hint = did_you_mean(str(name), METHODS)
        return [f"method.name: '{name}' is not one of {', '.join(METHODS)}, and no --plugin FILE has brought it{hint}"]
    try:
        fields = method_fields(name)
    except RecipeError as error:
        return [f"method.name: {name}: {error}"]
    problems = []
    for key, value in choice.items():
        if key == "name":
            continue
        if key == BUDGET:
            problems += budget_problems(name, choice)
        elif key in {**METHODS[name].fixed, **METHODS[name].run}:
            problems.append(f"method.{key}: '{name}' sets this itself")
        elif key not in fields and (meant := _meant(key)) in METHODS[name].unread:
            problems.append(f"method.{key}: {name} never reads it; {METHODS[name].unread[meant]}")
        elif key not in fields:
            problems.append(f"method.{key}: {no_such_field(name, key, fields)}")
        else:
            fault = explain(fields[key], value)
            if fault is not None:
                problems.append(f"method.{key}: {fault}")
    if not problems:
        try:
            problems += _replaced(choice, method_config(choice))
        except (ValueError, TypeError, AttributeError, ImportError, NotImplementedError) as error:
            problems.append(f"method: {name} refuses this: {error}")
    return problems


def _replaced(choice: dict[str, Any], config: Any) -> list[str]:
    """Fields whose default is named and replaced by the value of the adapter in `from_adapter`, as if it were not."""
    if choice.get("from_adapter") is None:
        return []
    hints = method_fields(choice["name"])
    problems = []
    for item in dataclasses.fields(config):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        taken = getattr(config, item.name)
        if item.name in choice and convert(hints[item.name], choice[item.name]) == default != taken:
            problems.append(
                f"method.{item.name}: {choice[item.name]}, and the adapter in method.from_adapter, whose shared "
                f"tensors are taken over, has {taken}; leave the key out"
            )
    return problems


def no_such_field(name: str, key: str, fields: Iterable[str]) -> str:
    """The fault of a key that is no field of the method: with the methods that have it, or with the nearest field."""
    from .names import answer

    if METHODS[name].config is None:
        return f"{name} trains weights of the model itself and has no such field; leave it out"
    if others := [other for other in METHODS if key in _fields_or_none(other)]:
        return f"{name} has no such field; it belongs to {', '.join(others)}"
    names = [f"method.{field}" for field in fields]
    hint = (answer(key) if key not in SYNONYMS else None) or ""
    if hint.startswith(", did you mean method.") and hint not in [f", did you mean {other}?" for other in names]:
        hint = ""  # a field of other methods
    hint = hint or did_you_mean(f"method.{key}", names, SYNONYMS)
    return f"unknown{hint or f', {name} has no such field'}"


def _fields_or_none(name: str) -> Collection[str]:
    try:
        return method_fields(name)
    except RecipeError:  # the installed PEFT lacks the method
        return ()


def _meant(key: str) -> str:
    return SYNONYMS.get(key, key).removeprefix("method.")


def method_config(choice: dict[str, Any], **run: Any) -> Any | None:
    """The PEFT config of a checked `method.*`; None for a method that trains the model's own weights.

    `run` are the fields that the run sets (task_type, modules_to_save). Lists given for enums, tuples and nested
    dataclasses are converted to the declared types.
    """
    method = METHODS[choice["name"]]
    cls = method.config_class()
    if cls is None:
        return None
    hints = method_fields(choice["name"])
    values = {key: convert(hints[key], value) for key, value in choice.items() if key not in ("name", BUDGET)}
    if values.get("init_r", 12) <= values.get("target_r", 8) and "total_step" in method.run:
        raise ValueError("target_r must be below init_r, else there is nothing to allocate")
    return cls(**{**values, **method.fixed, **method.run, **run})


def budget_problems(name: str, choice: dict[str, Any]) -> list[str]:
    """Mistakes in `method.budget`, the maximum number of the method's own trainable parameters."""
    ranks, value = METHODS[name].ranks, choice[BUDGET]
    if ranks is None:
        return [f"method.budget: {name} has no rank to meet a budget with"]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return [f"method.budget: needs a whole number of parameters, at least 1, got {value!r}"]
    return [f"method.{key}: is chosen by method.budget; keep one of them" for key in ranks(8) if key in choice]


def convert(hint: Any, value: Any) -> Any:
    """`value` converted to the hint, if pydantic supports the hint; else unchanged."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except (PydanticSchemaGenerationError, ValidationError, TypeError, NameError):
        return value
