"""A method's type in PEFT, which has no API for external methods.

`peft.utils.register_peft_method` wants a member of the enum `PeftType`. A plain string in its place fails wherever PEFT
or transformers read `.value`, so a real member is added first.
"""

from peft import PeftType


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
