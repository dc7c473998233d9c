"""Low-rank paths around transformer layers: a tuner layer as child of the layer, and hooks on the layer.

Wrapping the layer instead would hide its class from FSDP's auto-wrap, from `_no_split_modules` and from the
hooks by which transformers records hidden states. A path over several layers is owned by the child of its
*last* layer, which adds it; the layers before it hand their input over, and the owner multiplies it: handing
over A x would need another layer's parameters, which FSDP2 has resharded by then.

`handover` describes the hand-over. A gradient checkpoint of `layer.forward`, as transformers makes it since 5.20, runs
no hooks: the path itself is never recomputed, and the autograd graph keeps its input. A checkpoint of the layer's call
recomputes the path too.
"""

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ziggurat.errors import ConfigError, with_article
from ziggurat.host.bank import WithoutBase
from ziggurat.host.base.stream import stream
from ziggurat.host.method_layer import MethodLayer, rows_by_adapter
from ziggurat.host.paths.handover import Handover
from ziggurat.host.root_hook import hooks_of, take_off
from ziggurat.host.site import CHILD
from ziggurat.host.tensors import Weight
from ziggurat.lowrank.pair import on_device
from ziggurat.lowrank.product import low_rank_add
from ziggurat.lowrank.spans import Span

#: The name of the hand-over in the attributes of the module that holds the stack.
HANDOVER = "_paths_in_flight"


class PathLayer(WithoutBase, MethodLayer, nn.Module):
    """The paths that end at one layer, one an adapter: h_out = Layer(h_in) + sum of B (A dropout(x)).

    x is the input of the first layer of the adapter's span.
    """

    #: The reason why `ziggurat.export` refuses, and the alternatives.
    cannot_export = (
        "a path goes around a whole layer, and no update of a linear layer can say that. Keep the adapter beside the "
        "model, write a model folder with its paths by `ziggurat merge`, or write the injected LoRA alone by "
        "ziggurat.methods.lor2c.serve.write_injected_lora"
    )
    other_param_names = (*MethodLayer.other_param_names, "covers")

    #: That of the stack; set by `attach`.
    _handover: Handover

    def __init__(self, layer: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._begin()
        self.in_features = self.out_features = width
        self.layer = layer
        self._place = (device, dtype)
        #: Adapter -> the span that this layer lies in; None where no path passes the layer.
        self.covers: dict[str, Span | None] = {}

    def weight_of_base(self, path: str) -> Weight:
        """None: a path goes around a whole layer."""
        return Weight(path, lambda: self.weight)

    def home(self) -> tuple[torch.device, torch.dtype]:
        """Where fresh tensors go: the device that the layer computes on, and the dtype of its weights."""
        return self._place

    @property
    def adapters(self) -> Collection[str]:
        """The adapters that have a path ending at this layer."""
        return [adapter for adapter, span in self.covers.items() if span is not None and span.last == self.layer]

    def hand_over(self, x: Tensor) -> None:
        """Keep the layer's input for the spans that pass here, unless an earlier layer of theirs has done so."""
        if self._disable_adapters:
            return
        for adapter, span in self.covers.items():
            if span is not None and span.length > 1:
                key, active = (adapter, span.last), adapter in self.active_adapters
                if not self._handover.give(key, x, first=span.first == self.layer, active=active):
                    raise RuntimeError(_lacks(span, self.layer, RUN_ALONE))

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """Adapter -> the input of its span, of those with a path ending here; `x` is the layer's own."""
        inputs = {}
        for adapter, span in self.covers.items():
            if span is not None and span.last == self.layer:
                read = self._handover.take((adapter, span.last)) if span.length > 1 else x
                if read is not None:
                    inputs[adapter] = read
                elif adapter in self.active_adapters:
                    raise RuntimeError(_lacks(span, self.layer, RECOMPUTED))
        return inputs

    def forward(self, y: Tensor, inputs: dict[str, Tensor], adapter_names: list[str] | None = None) -> Tensor:
        """`y`, the layer's output, with the paths of the active adapters added."""
        if adapter_names is not None:
            return self._add_by_sample(y, inputs, adapter_names)
        for adapter, x in inputs.items():
            if adapter in self.active_adapters:
                y = self._add(y, x, adapter, self.dropout(adapter) if self.training else 0.0)
        return y

    def _add(self, y: Tensor, x: Tensor, adapter: str, dropout: float) -> Tensor:
        if x.shape != y.shape:
            raise ConfigError(
                f"layer {self.layer} returns {tuple(y.shape)}, but the span of adapter {adapter!r} reads "
                f"{tuple(x.shape)}: a path needs layers whose output has the shape of their input. Leave this "
                "layer out by layers_to_transform, or end the span before it."
            )
        a, b = on_device(self.effective_pair(adapter, self.context(adapter)), y.device)
        return low_rank_add(y, x if x.device == y.device else x.to(y.device), a, b, dropout)

    def _add_by_sample(self, y: Tensor, inputs: dict[str, Tensor], adapter_names: list[str]) -> Tensor:
        """Each sample of the batch with the adapter named for it ("__base__": none). Inference only."""
        y = y.clone()
        for adapter, rows in rows_by_adapter(adapter_names, len(y), inputs, y.device):
            x = inputs[adapter]
            y[rows] = self._add(y[rows], x[rows.to(x.device)], adapter, 0.0)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a path reads the residual stream, which no weight of the model multiplies."""
        if names := [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.covers]:
            raise ValueError(CANT_MERGE.format(adapters=", ".join(map(repr, names))))

    def unmerge(self) -> None:
        """Nothing is ever merged."""


RUN_ALONE = (
    "runs outside the forward of the module that holds the layers. Call the layers through that module, or use paths "
    "around single layers (no spans, no merges)."
)
RECOMPUTED = (
    "is recomputed in a backward, and its checkpoint has kept nothing from the forward that leads back to it. "
    "Checkpoint `layer.forward` as transformers does since 5.20, or call torch.utils.checkpoint with the layer and its "
    "hidden states as an argument, or use paths around single layers (no spans, no merges)."
)


def _lacks(span: Span, layer: int, why: str) -> str:
    return (
        f"the path over layers {span.first} to {span.last} needs the input of layer {span.first}: layer {layer} {why}"
    )


CANT_MERGE = (
    "adapter {adapters} can't be merged into weights: its paths add B A h to the output of a whole transformer layer, "
    "past its norms and its attention, so no weight of the model can absorb them. Keep the adapter beside the model "
    "(PeftModel.from_pretrained), or write a folder that holds the model with its paths by `ziggurat merge`."
)


def check_room(layer: nn.Module, name: str) -> None:
    """Raise ConfigError if no path can be a child of `layer`, called `name` in its model. Changes nothing."""
    if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ConfigError(
            f"layer {name!r} is {with_article(type(layer).__name__)}, which runs all its children, so no path can be "
            "put beside them. Wrap it in a module of its own with a forward."
        )
    if hasattr(layer, CHILD) and path_of(layer) is None:
        raise ConfigError(f"layer {name!r} has an attribute {CHILD!r} already, the name of its path. Rename it.")


def attach(layer: nn.Module, holder: nn.Module, path: PathLayer) -> None:
    """Make `path` a child of `layer`, and let hooks feed it. `holder` is the module that runs the stack's layers."""
    layer.add_module(CHILD, path)
    layer.register_forward_pre_hook(_before, with_kwargs=True)
    # First of all hooks, so that others (recorders of hidden states, FSDP) see the output with the path.
    layer.register_forward_hook(_after, with_kwargs=True, prepend=True)
    if HANDOVER not in holder.__dict__:
        holder.__dict__[HANDOVER] = Handover()
        holder.register_forward_pre_hook(_open)
        holder.register_forward_hook(_close, always_call=True)
    path._handover = holder.__dict__[HANDOVER]


def detach(model: nn.Module) -> None:
    """Take all paths out of `model`, with their hooks."""
    for module in list(model.modules()):
        if path_of(module) is not None:
            delattr(module, CHILD)
        module.__dict__.pop(HANDOVER, None)
        ours = (_before, _after, _open, _close)
        take_off(module, [key for key, hook in hooks_of(module).items() if hook in ours])


def path_of(layer: nn.Module) -> PathLayer | None:
    """The path that is a child of `layer`, if there is one."""
    child = layer._modules.get(CHILD)
    return child if isinstance(child, PathLayer) else None


def _before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    path: PathLayer = layer._modules[CHILD]  # type: ignore[assignment]
    path.hand_over(stream(args, kwargs))


def _after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    path: PathLayer = layer._modules[CHILD]  # type: ignore[assignment]
    if path._disable_adapters:
        return None
    inputs = path.inputs(stream(args, kwargs))
    if not inputs:
        return None
    if isinstance(output, Tensor):
        return path(output, inputs)
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        first = path(output[0], inputs)
        if hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: first})  # type: ignore[union-attr]
        return type(output)((first, *output[1:]))
    raise ConfigError(
        f"{type(layer).__name__} returns {with_article(type(output).__name__)}; a path can be added to a tensor, or to "
        "the first tensor of a tuple or list. Leave these layers out by layers_pattern."
    )


def _open(holder: nn.Module, args: Any) -> None:
    holder.__dict__[HANDOVER].open()


def _close(holder: nn.Module, args: Any, output: Any) -> None:
    holder.__dict__[HANDOVER].close()
