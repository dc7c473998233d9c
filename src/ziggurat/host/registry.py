"""Registering a method with PEFT, which has no door for methods from outside.

`peft.utils.register_peft_method` wants a member of the enum `PeftType`. A plain
string in its place fails wherever PEFT or transformers read `.value`, so a real
member is added first and the official function is called with it.
"""

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from ziggurat.errors import ConfigError


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` called `name` (upper case), added if it is not there yet."""
    members = PeftType._member_map_
    if name not in members:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member._sort_order_ = len(members)  # pyright: ignore[reportAttributeAccessIssue]
        members[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return members[name]  # type: ignore[return-value]


def register(config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Make `config_cls` and `tuner_cls` a PEFT method called as `tuner_cls.prefix` says.

    PEFT derives a method's name from its prefix: prefix `msplora_`, type `MSPLORA`.
    Registering the same pair again does nothing.

    Raises:
        ConfigError: another package has registered the name for another config.
    """
    name = tuner_cls.prefix.removesuffix("_")
    member = peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return
    if known is not None:
        raise ConfigError(
            f"PEFT type {name.upper()} is taken by {known.__module__}.{known.__qualname__}; "
            f"{config_cls.__module__}.{config_cls.__qualname__} can't be registered beside it. "
            "Import only one of the two packages."
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)
