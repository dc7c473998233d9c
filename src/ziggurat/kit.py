"""Everything for writing a method outside the package: see docs/your-own-method.md."""

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.method import EVALUATION, Card, Context, Method, Part, Stored
from ziggurat.host.registry import register, unregister
from ziggurat.host.saved.structure import MergingConfig, acting_parameters, shared_tensors
from ziggurat.host.site import Site, check_room
from ziggurat.host.tensors import Init, TensorSpec, Weight, gaussian, kaiming, low_rank, normal, ones, zeros
from ziggurat.host.values import check_flag, is_whole, one_of, option, shown, whole
from ziggurat.lowrank.pair import FactorPair, stack

__all__ = [
    "EVALUATION",
    "Card",
    "ConfigError",
    "Context",
    "FactorPair",
    "Init",
    "MergingConfig",
    "Method",
    "MethodConfig",
    "Part",
    "Site",
    "Stored",
    "TensorSpec",
    "Weight",
    "acting_parameters",
    "check_flag",
    "check_room",
    "gaussian",
    "is_whole",
    "kaiming",
    "low_rank",
    "normal",
    "one_of",
    "ones",
    "option",
    "register",
    "shared_tensors",
    "shown",
    "stack",
    "unregister",
    "whole",
    "zeros",
]
