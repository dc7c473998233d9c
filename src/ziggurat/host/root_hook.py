"""Ziggurat's hooks on the base model's root: at most one of each class and method."""

from typing import Any, Self

from torch import nn

from ziggurat.host.method import Method

#: The tables of a module that may hold one of these hooks, and those with the flags of each hook.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_pre_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """Key -> hook of `module`, without torch's wrapper."""
    return {key: getattr(hook, "hook", hook) for name in HOOKS for key, hook in getattr(module, name).items()}


def take_off(module: nn.Module, keys: list[int]) -> None:
    """Take the hooks of these keys off `module`."""
    for name in (*HOOKS, *_FLAGS):
        for key in keys:
            getattr(module, name).pop(key, None)


class RootHook:
    """A hook on the base model's root, of one method, or of all. A subclass registers itself by `put_on`."""

    def __init__(self, method: Method | None = None) -> None:
        self.method = method

    def put_on(self, root: nn.Module) -> None:
        raise NotImplementedError

    @classmethod
    def on(cls, root: nn.Module, method: Method | None = None) -> Self | None:
        """The hook on `root`, or None."""
        # By name: a method that is registered again is another object.
        name = method and method.name
        ours = (hook for hook in hooks_of(root).values() if isinstance(hook, cls))
        return next((hook for hook in ours if (hook.method and hook.method.name) == name), None)

    @classmethod
    def start(cls, root: nn.Module, method: Method | None = None) -> Self:
        """The hook on `root`; a new one where there is none."""
        hook = cls.on(root, method)
        if hook is None:
            hook = cls(method)
            hook.put_on(root)
        return hook


def stop_hooks(root: nn.Module, method: Method) -> None:
    """Take the hooks of `method`, and those that serve every method, off `root`."""
    ours = {key: hook.method for key, hook in hooks_of(root).items() if isinstance(hook, RootHook)}
    take_off(root, [key for key, of in ours.items() if of is None or of.name == method.name])
