"""Where the layers of a model are: its stacks, and the place of a module in one.

A *numbered list* is a module whose children are all named by numbers, as in `nn.ModuleList` and
`nn.Sequential`. Numbered lists are everywhere (experts, sub-layers, two-linear MLPs, heads), so a
rule has to say which of them are stacks of layers. It reads structure only, no names and no config:

1. A *layer* is a member that has modules of its own. A bare `Linear`, `GELU` or `Dropout` is none,
   so `Sequential(Linear, GELU, Linear)` is not a stack.
2. A list *repeats* when two of its layers are of one class and every weight that both have is of one
   shape: layers can share factors only where shapes repeat. Two of them and not all, because hybrids
   (Jamba, Zamba) put other classes in between, and a `Sequential` may hold a stem and a head too.
3. The outermost list that repeats is a stack. Experts, T5's sub-layers and MLPs lie inside a layer
   and never number layers. A list that does not repeat is passed through: Swin doubles the width from
   stage to stage, so its stages are no stack, and the blocks of each stage are one.
4. A list that does not repeat is a stack all the same if nothing inside it is one and its members
   are layers of one class: a single layer, or layers that all differ in width (OpenELM). An
   `nn.ModuleList` of one layer is a stack whatever it holds: T5 with one block, one layer of experts.

Structure cannot tell two equal towers in one list from two layers; `layers_pattern` says it then.
A module that is listed twice is one layer, and ALBERT, which runs one layer many times, has one.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Size, nn

from ziggurat.errors import AnatomyError
from ziggurat.host.base.unwrap import Node, bare_path, bare_tree, unwrap


class Place(NamedTuple):
    """Where a module stands in its stack.

    `stack`: path of the list of layers; `layer`: its number, from 0; `role`: the path inside the
    layer ("attention.self.query"; "" for the layer itself); `num_layers`: of the whole stack.
    """

    stack: str
    layer: int
    role: str
    num_layers: int


class Anatomy:
    """The stacks of a model, and the place of each of its modules.

    Args:
        model: the base model (`tuner.model`); a `PeftModel` or a tuner is unwrapped. Tuner layers in
            it are looked through, so stacks and places are those of the model without adapters.
        layers_pattern: as in PEFT, the name of the list of layers, or several. It matches whole
            components at the end of a path ("layer", "encoder.layer") and may be a regular expression.
            Where given, the outermost numbered lists that match are the stacks, whatever the rule of
            this module says, and their layers are the members that have weights.

    Raises:
        AnatomyError: `layers_pattern` is no regular expression, or matches no numbered list.
    """

    def __init__(self, model: nn.Module, layers_pattern: str | Sequence[str] | None = None):
        self._model, self._prefix = unwrap(model)
        root = bare_tree(self._model)
        self._lists = {node.path: len(node.children) for node in root.walk() if node.is_list}
        self._layers: dict[str, list[str]] = {}
        self._number: dict[str, tuple[str, int]] = {}
        for stack, members in (_named_stacks(root, layers_pattern) if layers_pattern else _stacks(root)).items():
            layers = _distinct(members)
            self._layers[stack] = [layer.path for layer in layers]
            number = {id(layer.module): n for n, layer in enumerate(layers)}
            self._number |= {member.path: (stack, number[id(member.module)]) for member in members}
        if layers_pattern and not self._layers:
            raise AnatomyError(
                f"layers_pattern={layers_pattern!r} matches no list of layers in {self._name}. "
                f"{self._overview()} Set layers_pattern to the last part of one of these paths."
            )

    @property
    def stacks(self) -> dict[str, int]:
        """The number of layers of each stack, in the order of the model."""
        return {stack: len(layers) for stack, layers in self._layers.items()}

    def layers(self, stack: str) -> list[str]:
        """The paths of the layers of `stack`, in order.

        Raises:
            AnatomyError: there is no stack of that name.
        """
        if stack not in self._layers:
            raise AnatomyError(f"{stack!r} is no stack of layers of {self._name}. {self._overview()}")
        return list(self._layers[stack])

    def find(self, path: str) -> Place | None:
        """The place of the module or parameter at `path`; None where it lies in no stack or is missing.

        The path may be that of the wrapped model: "q.base_layer" and "q.lora_A.default" give the place of "q". The
        prefix "base_model.model." of a `PeftModel` is accepted too.
        """
        bare = self._bare_path(path)
        return None if bare is None else self._find_bare(bare)

    def position(self, path: str) -> Place:
        """As `find`; a module outside every stack counts as a stack with one layer."""
        return self.find(path) or Place(stack=path, layer=0, role="", num_layers=1)

    def place(self, path: str) -> Place:
        """The place of the module or parameter at `path`, as `find` gives it.

        Raises:
            AnatomyError: nothing is at `path`, or it lies in no stack. The text lists the numbered
                lists of the model with their lengths, and names the field to set.
        """
        bare = self._bare_path(path)
        if bare is None:
            raise AnatomyError(f"{self._name} has no module {path!r}. Give a name from model.named_modules().")
        place = self._find_bare(bare)
        if place is None:
            raise AnatomyError(
                f"module {path!r} of {self._name} is in no stack of layers, so it has no layer number. "
                f"{self._overview()} If it is in one of these lists, set layers_pattern to the last part of the "
                "list's path; otherwise leave it out with target_modules or exclude_modules."
            )
        return place

    @property
    def _name(self) -> str:
        return type(self._model).__name__

    def _overview(self) -> str:
        def listing(lengths: dict[str, int], unit: str) -> str:
            shown = [f"{path!r} ({length} {unit})" for path, length in list(lengths.items())[:12]]
            unlisted = len(lengths) - len(shown)
            return ", ".join(shown) + (f" and {unlisted} more" if unlisted else "") if shown else "none"

        others = {path: length for path, length in self._lists.items() if not self._in_stack(path)}
        return f"Stacks: {listing(self.stacks, 'layers')}. Other lists: {listing(others, 'members')}."

    def _in_stack(self, path: str) -> bool:
        return path in self._layers or self._find_bare(path) is not None

    def _find_bare(self, path: str) -> Place | None:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            if position := self._number.get(".".join(parts[:end])):
                stack, number = position
                return Place(stack, number, ".".join(parts[end:]), len(self._layers[stack]))
        return None

    def _bare_path(self, path: str) -> str | None:
        # The base model's own paths go first: they may begin like the prefix ("model.layers").
        bare = bare_path(self._model, path)
        if bare is None and self._prefix and path.startswith(self._prefix):
            bare = bare_path(self._model, path.removeprefix(self._prefix))
        return bare


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    first: dict[int, Node] = {}
    for node in nodes:
        first.setdefault(id(node.module), node)
    return list(first.values())


def _stacks(node: Node) -> dict[str, list[Node]]:
    """The stacks at and below `node`, with their layers, by the rule in this module's docstring."""
    layers = [child for child in node.children.values() if child.children]
    if node.is_list and (_repeats(layers) or (isinstance(node.module, nn.ModuleList) and _is_single(node))):
        return {node.path: layers}
    inside: dict[str, list[Node]] = {}
    for child in node.children.values():
        inside |= _stacks(child)
    one_kind = len(layers) == len(node.children) and len({type(layer.module) for layer in layers}) == 1
    if node.is_list and one_kind and not inside:
        return {node.path: layers}
    return inside


def _is_single(node: Node) -> bool:
    members = list(node.children.values())
    return len(_distinct(members)) == 1 and bool(members[0].children)


def _repeats(layers: Sequence[Node]) -> bool:
    shapes_by_class: dict[type, list[dict[str, Size]]] = {}
    for layer in _distinct(layers):
        shapes = layer.shapes()
        alike = shapes_by_class.setdefault(type(layer.module), [])
        if any(all(shapes[name] == other[name] for name in shapes.keys() & other.keys()) for other in alike):
            return True
        alike.append(shapes)
    return False


def _named_stacks(root: Node, layers_pattern: str | Sequence[str]) -> dict[str, list[Node]]:
    """The outermost numbered lists whose path matches, with their members that have weights."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    try:
        name = re.compile("|".join(rf"(?:.*\.)?(?:{pattern})" for pattern in patterns))
    except re.error as error:
        raise AnatomyError(
            f"layers_pattern={layers_pattern!r} is no regular expression ({error}). Give the name of the "
            'list of layers, such as "layers", "h" or "encoder.layer".'
        ) from error

    def below(node: Node) -> dict[str, list[Node]]:
        if node.is_list and name.fullmatch(node.path):
            members = [child for child in node.children.values() if child.shapes()]
            return {node.path: members} if members else {}
        stacks: dict[str, list[Node]] = {}
        for child in node.children.values():
            stacks |= below(child)
        return stacks

    return below(root)
