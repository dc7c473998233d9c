"""Registering a method: its classes, and its place in PEFT's tables."""

import sys
from collections.abc import Sequence
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from ziggurat.errors import ConfigError
from ziggurat.host.bank import Bank
from ziggurat.host.config import MethodConfig
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method import METHODS, Method
from ziggurat.host.method_layer import ExpertsLayer
from ziggurat.host.peft_type import peft_type
from ziggurat.host.saved.loading import load_through_methods
from ziggurat.host.saved.structure import StructureBank, StructureTuner
from ziggurat.host.tuner import MethodTuner


def register(
    method: Method,
    tuner: type[MethodTuner] = MethodTuner,
    layer: type[AdaptedLinear] = AdaptedLinear,
    bank: type[Bank] = Bank,
    more_layers: Sequence[type[Any]] = (),
) -> None:
    """Make `method` a PEFT method, for `get_peft_model`, `PeftModel.from_pretrained` and everything built on them.

    For cases that the two functions can't express: a subclass of the `tuner`, of the adapted linear `layer`, of the
    `bank`, and `more_layers`, further tuner layers of the method. Registering the same method again does nothing; one
    whose config has the same module and name, as when a notebook's cell runs again, takes the place of the earlier one.

    Raises:
        ConfigError: the name is no Python name in lower case, or another package has taken it; the config is no
            `MethodConfig`.
    """
    if not (isinstance(method.config, type) and issubclass(method.config, MethodConfig)):
        raise ConfigError(
            f"the config of method {method.name!r} is {method.config!r}: a subclass of MethodConfig is needed."
        )
    if not method.name.isidentifier() or not method.name.islower():
        raise ConfigError(f"a method's name is a Python name in lower case, not {method.name!r}.")
    member = peft_type(method.peft_type)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is method.config:
        return
    if registered is not None and _written_at(registered) == _written_at(method.config):
        unregister(method.name)
        registered = None
    if registered is not None:
        raise ConfigError(
            f"PEFT type {method.peft_type} is taken by {_written_at(registered)}; {_written_at(method.config)} can't "
            "be registered beside it. Import only one of the two packages."
        )
    if method.reads is not None:
        tuner = StructureTuner if tuner is MethodTuner else tuner
        bank = StructureBank if bank is Bank else bank
    method.config.method = method
    shown = method.config.__name__.removesuffix("Config")
    layer_cls = _of(method, layer, (AdaptedLinear,), f"{shown}Linear")
    bank_cls = _of(method, bank, (Bank, StructureBank), f"{shown}Bank")
    tuner_cls = _of(method, tuner, (MethodTuner, StructureTuner), f"{shown}Model")
    for kind in (layer_cls, bank_cls, *more_layers):
        kind.method, kind.adapter_layer_names = method, (method.store,)
    tuner_cls.method, tuner_cls.prefix = method, method.prefix
    tuner_cls.layer_cls, tuner_cls.bank_cls = layer_cls, bank_cls
    tuner_cls.tuner_layer_cls = (layer_cls, bank_cls, ExpertsLayer, *more_layers)
    load_through_methods()
    register_peft_method(name=method.name, config_cls=method.config, model_cls=tuner_cls)
    METHODS[method.peft_type] = method


def unregister(name: str) -> None:
    """Take the method called `name` out of PEFT's tables and ours. Models that have its adapters stay as they are."""
    member = peft_type(name.upper())
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        table.pop(member, None)
    METHODS.pop(name.upper(), None)


def _written_at(config: type[Any]) -> str:
    return f"{config.__module__}.{config.__qualname__}"


def _of(method: Method, cls: type[Any], general: tuple[type[Any], ...], name: str) -> type[Any]:
    """`cls`, or where it is one of the `general` classes a subclass for this method.

    It stands in the module of the method's config, so that models can be pickled.
    """
    if cls not in general:
        return cls
    module = sys.modules[method.config.__module__]
    made = type(name, (cls,), {"__module__": module.__name__, "__qualname__": name})
    setattr(module, name, made)
    return made
