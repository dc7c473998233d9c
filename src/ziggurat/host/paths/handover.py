"""Handing the input x of a span's first layer over to its last, in a forward and where a backward recomputes layers.

In a forward, x lies in a frame that lives as long as one forward of the module that holds the stack, one a thread.
So two threads on one model never mix, an aborted forward leaves nothing behind, and copies and pickles start empty.

A gradient checkpoint may recompute a layer with its hooks, in a backward: transformers before 5.20 does, torch's
`checkpoint_wrapper` does, and so does any checkpoint of `layer(x)`. Then no forward is running, and x has two sources.
If the span's first layer is recomputed too, x is its input again. Otherwise x was computed outside the checkpoint; a
`Kept` holds it, and is found by the input of a layer after the first: by its node in the autograd graph, since a
reentrant checkpoint detaches inputs, or without one by the tensor itself. The node owns the `Kept` too, so x lives no
longer than the graph; a backward that frees the graph frees it earlier.

A reentrant checkpoint has a graph of its own, which ends at its inputs, and x is none of them. So x is recomputed
with as a leaf, and the gradient that the leaf gets is added to x's by a hook on x. That is in time: the backward of
x comes after that of every layer that x leads to.
"""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

try:
    from torch._C._autograd import _get_current_graph_task_keep_graph
except ImportError:  # private; without it x lives as long as its graph

    def _get_current_graph_task_keep_graph() -> bool:
        return True


#: The key of a `Kept` in the metadata of an autograd node, or in a tensor without one.
MARK = "_ziggurat_handed_over"


class Frame:
    """The inputs handed over in one forward, or in one recomputation, and not taken yet."""

    def __init__(self, node: Any, recomputes: bool) -> None:
        #: The node whose backward is running; None in a forward outside of any backward.
        self.node = node
        self.recomputes = recomputes
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.kept: dict[tuple[str, int], Kept] = {}

    def drop(self) -> None:
        self.node = None
        self.inputs.clear()
        self.kept.clear()


class Handover:
    """The inputs of the spans whose last layer has not run yet, for the forward calls now running."""

    def __init__(self) -> None:
        self._local = threading.local()
        #: Compilers can't trace thread-locals; in a trace the frame is opened and closed, so no state remains.
        self._traced: Frame | None = None

    def open(self) -> None:
        """A forward begins in this thread: leftovers of an earlier one are dropped."""
        if torch.compiler.is_compiling():
            self._traced = Frame(None, recomputes=False)
        else:
            self._local.frame = Frame(torch._C._current_autograd_node(), recomputes=False)

    def close(self) -> None:
        """The forward has ended, by a result or by an exception."""
        self._traced = None
        if not torch.compiler.is_compiling():
            self._local.frame = None

    def give(self, key: tuple[str, int], x: Tensor, first: bool, active: bool) -> bool:
        """A layer of the span called `key` reads `x`; `first`: it is the span's first; `active`: the span's path acts.

        The input of the first layer that runs is taken, because a layer may be dropped. False: no forward is running
        that could take it.
        """
        frame = self._frame()
        if frame is None:
            return False
        if key not in frame.inputs:
            kept = _find(x, (id(self), *key)) if frame.recomputes and not first else None
            if kept is not None:
                frame.kept[key], frame.inputs[key] = kept, kept.again()
            elif first or not frame.recomputes:
                frame.inputs[key] = x
        elif active and frame is not self._traced and _may_be_recomputed(x):
            if key not in frame.kept:
                frame.kept[key] = Kept(frame.inputs[key])
            frame.kept[key].attach(x, (id(self), *key))
        return True

    def take(self, key: tuple[str, int]) -> Tensor | None:
        """The x of the span called `key`, which has reached its last layer; None if it is not known."""
        frame = self._frame()
        if frame is None:
            return None
        frame.kept.pop(key, None)
        return frame.inputs.pop(key, None)

    def _frame(self) -> Frame | None:
        """The frame of this thread's forward, or of the recomputation that the running backward has asked for."""
        if self._traced is not None or torch.compiler.is_compiling():
            return self._traced
        node = torch._C._current_autograd_node()
        frame: Frame | None = getattr(self._local, "frame", None)
        if frame is not None and frame.node is node:
            return frame
        if node is None:
            return None
        again: Frame | None = getattr(self._local, "again", None)
        if again is None or again.node is not node:
            again = self._local.again = Frame(node, recomputes=True)
            torch.autograd.Variable._execution_engine.queue_callback(again.drop)
        return again

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handover":
        return Handover()

    def __reduce__(self) -> Any:
        return Handover, ()


class Kept:
    """The x of one span in one forward, for recomputations of layers after the span's first.

    It holds no node of the graph: the graph owns it.
    """

    def __init__(self, x: Tensor) -> None:
        self._leaf: Tensor | None = x.detach().requires_grad_(x.requires_grad)
        self._version = x._version
        self._gradient: Tensor | None = None
        self._ends = False
        if x.requires_grad:
            myself = weakref.ref(self)
            handle = x.register_hook(lambda gradient: _collected(myself(), gradient))
            weakref.finalize(self, handle.remove)

    def attach(self, h: Tensor, key: Any) -> None:
        """Attach this to `h`, so that recomputations which read `h` find it and it lives as long as they are
        possible."""
        if not h.requires_grad:
            setattr(h, MARK, {**getattr(h, MARK, {}), key: self})
            return
        node = _node(h)
        for place in (node, *_behind(node)):
            place.metadata.setdefault(MARK, {})[key] = self
        if not self._ends:
            # When the gradient of h is known, all layers that read h or came after have been recomputed.
            self._ends = True
            node.register_prehook(self._end)

    def again(self) -> Tensor:
        """x, as a leaf of the graph of its own that a recomputation builds."""
        if self._leaf is None:
            raise RuntimeError("a layer is recomputed after the backward that freed its graph; set retain_graph=True.")
        if self._leaf._version != self._version:
            raise RuntimeError(
                "the residual stream that a path reads was modified by an inplace operation after the path's first "
                "layer has read it, so a gradient checkpoint can't recompute the path."
            )
        return self._leaf

    def _end(self, gradients: Any) -> None:
        if self._leaf is not None and self._leaf.grad is not None:
            self._gradient, self._leaf.grad = self._leaf.grad, None
            torch.autograd.Variable._execution_engine.queue_callback(self._check)
        if not _get_current_graph_task_keep_graph():
            self._leaf = None

    def _check(self) -> None:
        if self._gradient is not None:
            self._gradient = None
            raise RuntimeError(
                "the gradient of a path's input has not reached the layers before it: something between the first and "
                "the last layer of the path cuts the graph. Checkpoint with use_reentrant=False."
            )


def _collected(kept: Kept | None, gradient: Tensor) -> Tensor | None:
    """The gradient of x with that of the recomputed paths."""
    if kept is None or kept._gradient is None:
        return None
    total, kept._gradient = gradient + kept._gradient, None
    return total


def _may_be_recomputed(h: Tensor) -> bool:
    """Whether a checkpoint can recompute the layer that reads `h`; a reentrant one runs it without gradients first."""
    return (torch.is_grad_enabled() or h.requires_grad) and not torch._C._are_functorch_transforms_active()


def _find(h: Tensor, key: Any) -> Kept | None:
    """The `Kept` attached to `h`, which a checkpoint has given back to a recomputation."""
    if not h.requires_grad:
        places = [vars(h)]
    else:
        node = _node(h)
        places = [place.metadata for place in (node, *_behind(node))]
    # A reentrant checkpoint is itself the node that is running, and leads to the inputs that it has detached.
    places += [place.metadata for place in _behind(torch._C._current_autograd_node(), leaves=True)]
    return next((place[MARK][key] for place in places if key in place.get(MARK, ())), None)


def _node(h: Tensor) -> Any:
    return h.grad_fn if h.grad_fn is not None else get_gradient_edge(h).node


def _behind(node: Any, leaves: bool = False) -> Iterator[Any]:
    """The nodes that a function written in Python leads to, such as the one that FSDP2 puts around a layer's inputs."""
    if isinstance(node, torch._C._FunctionBase):
        for place, _ in node.next_functions:
            if place is not None and (leaves or not hasattr(place, "variable")):
                yield place
