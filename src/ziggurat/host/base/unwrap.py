"""The model below its adapters: the modules and paths it had before PEFT wrapped any of them.

A tuner layer or a `modules_to_save` wrapper stands for the module it wraps; a tuner layer that wraps nothing (shared
factors, a path beside a layer) belongs to the adapter and is not part of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Size, nn

#: PEFT's prefix of the base model's tensors.
PREFIX = "base_model.model."


@dataclass(eq=False)
class Node:
    """A module of the unwrapped model, with its children."""

    path: str
    module: nn.Module
    children: dict[str, "Node"] = field(default_factory=dict)

    @property
    def is_list(self) -> bool:
        """Whether all children are named by numbers, as in `nn.ModuleList` and `nn.Sequential`."""
        return bool(self.children) and all(name.isdecimal() for name in self.children)

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, in the order of the model."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def shapes(self) -> dict[str, Size]:
        """The shape of every weight of this module and those below, by its path from here."""
        shapes = {name: weight.shape for name, weight in self.module._parameters.items() if weight is not None}
        for name, child in self.children.items():
            shapes |= {f"{name}.{inner}": shape for inner, shape in child.shapes().items()}
        return shapes


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model inside a `PeftModel` or a tuner, and the path ("base_model.model.") that leads to it."""
    prefix = ""
    while isinstance(model, PeftModel | PeftMixedModel | BaseTuner):
        step = "model" if isinstance(model, BaseTuner) else "base_model"
        model, prefix = model.get_submodule(step), f"{prefix}{step}."
    return model, prefix


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside wrappers for training: DDP, DataParallel, torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner, nn.Module):
            model = inner
        else:
            return model


def look_through(module: nn.Module) -> nn.Module | None:
    """The module of the unwrapped model that `module` wraps, or `module` itself; None where it wraps nothing."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
            if inner is module:
                return None
            module = inner
        else:
            return module


def bare_tree(module: nn.Module, path: str = "", above: frozenset[int] = frozenset()) -> Node:
    """The tree of the unwrapped model's modules. `above` holds the ids of the ancestors, to end cycles."""
    node = Node(path, module)
    above = above | {id(module)}
    for name, child in module._modules.items():
        bare = None if child is None else look_through(child)
        if bare is not None and id(bare) not in above:
            node.children[name] = bare_tree(bare, f"{path}.{name}" if path else name, above)
    return node


def bare_path(model: nn.Module, path: str) -> str | None:
    """The path in the unwrapped model of the module or parameter at `path` of `model`; None where nothing is.

    "q.base_layer" and "q.lora_A.default" are "q"; a module that an adapter added to a layer has the path of the layer.
    """
    module, bare = model, []
    for part in path.split("."):
        inner = look_through(module)
        if inner is None:
            break
        if part in inner._parameters:
            module = nn.Module()
            bare.append(part)
        elif inner is not module and part in module._modules:
            if part not in ("base_layer", "original_module"):
                break
            module = module.get_submodule(part)
        elif (child := inner._modules.get(part)) is not None:
            module = child
            if look_through(child) is not None:
                bare.append(part)
        else:
            return None
    return ".".join(bare)
