"""The memory of a training step: weights, trained parameters with gradients and AdamW's moments, saved activations.

Activations are counted, not guessed: one forward of the adapted model on the meta device, which computes nothing, with
every tensor that autograd would keep for the backward. Attention through torch's fused kernels is counted as these keep
it: inputs, output and one value per row, not the L x L weights. Per sample all grows as a L + c L^2 with the length L
(c is not 0 where attention is written out, or has a mask); two lengths give a and c.

Gradient checkpointing keeps tensors outside the layers, every layer's input, and all of the largest layer during its
recomputation. NF4 weights (QLoRA) take 4 bits, a byte per block of 64 for its scale, and a float32 per 256 blocks
[Dettmers et al. 2023, double quantisation].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ziggurat.lowrank.remade import unchanged


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step. `activations` is None if the model can't be traced without weights.

    weights + 2 x trained (values and gradients) + 8 per trainable parameter (AdamW's two moments in float32) +
    activations, with activations = batch (a L + c L^2). Not included: the device's context, kernels' workspaces,
    fragmentation.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int | None
    batch: int
    length: int
    a: float = 0.0
    c: float = 0.0

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.gradients + self.optimizer + (self.activations or 0)

    @property
    def formula(self) -> str:
        """The formula of the activations with its coefficients, in bytes."""
        if self.activations is None:
            return "weights + 2 x trained + 8 per trainable parameter; activations unknown"
        return f"batch x ({self.a:,.0f} L + {self.c:,.1f} L²) bytes"


@dataclass(frozen=True)
class Step:
    """The input of a step: `labels` are "tokens", "classes", "values" or None; `pair`: two texts, encoded apart."""

    batch: int
    length: int
    labels: str | None = None
    pair: bool = False
    checkpointing: bool = False
    four_bits: bool = False


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps between a forward on `inputs` and its backward, beside parameters and buffers.

    A tensor kept several times, or in several views, counts once. Works on any device, on meta without computing.
    """
    storages, _ = _kept(model, inputs)
    return sum(storage.nbytes() for storage in storages.values())


def checkpointed_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """The largest number of bytes kept at once if each layer's activations are recomputed in the backward.

    The layers are those that transformers checkpoints. Raises ValueError if there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("the model has no layers that transformers checkpoints")
    storages, places = _kept(model, inputs, layers)
    inside: dict[int, int] = {}
    outside = 0
    for key, storage in storages.items():
        layer = places.get(key)
        if layer is None:
            outside += storage.nbytes()
        else:
            inside[layer] = inside.get(layer, 0) + storage.nbytes()
    return outside + max(inside.values(), default=0)


def _kept(
    model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[nn.Module] = ()
) -> tuple[dict[int, Any], dict[int, int]]:
    """The kept storages, by address, and the index into `layers` of those that are freed with a layer.

    A layer's input stays.
    """
    parameters = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    storages: dict[int, Any] = {}
    places: dict[int, int] = {}
    entered: set[int] = set()
    current: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in storages:
            storages[storage._cdata] = storage  # holding it keeps its address from being used again
            if current and storage._cdata not in entered:
                places[storage._cdata] = current[-1]
        return tensor

    def enter(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor in args:
                if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in parameters:
                    storages[storage._cdata] = storage
                    entered.add(storage._cdata)
                    places.pop(storage._cdata, None)
            current.append(number)

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current.pop()

    hooks = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, unchanged):
            output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    del output
    return storages, places


class _Fused(torch.autograd.Function):
    """Keeps the tensors that a fused attention kernel keeps for its backward, without computing anything."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        row_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, row_sums, *([] if mask is None else [mask]))
        return out


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch decomposes attention; this counts it as the fused kernel of a real device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_meta:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return _Fused.apply(*args[:3], mask)
        return func(*args, **kwargs)


def memory(model: nn.Module, step: Step) -> Memory:
    """The estimate for an adapted model on the meta device."""
    everything = list({id(p): p for p in model.parameters()}.values())
    trains = [p for p in everything if p.requires_grad]
    trained = sum(p.numel() * p.itemsize for p in trains)
    frozen = [p for p in everything if not p.requires_grad]
    weights = _four_bit_bytes(model, frozen) if step.four_bits else sum(p.numel() * p.itemsize for p in frozen)
    count = sum(p.numel() for p in trains)
    batch, length = step.batch, step.length
    a = c = 0.0
    activations = None
    measure = checkpointed_bytes if step.checkpointing else saved_bytes
    model.train()
    try:
        half = max(length // 2, 1)
        short, whole = (float(measure(model, _inputs(model, n, step))) for n in (half, length))
        if half < length:
            c = max(0.0, (whole / length - short / half) / (length - half))
        a = whole / length - c * length
        activations = round(batch * whole)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        # Some models look at values in their forward (masks, routing), and on the meta device there are none.
        pass
    return Memory(weights, trained, trained, 8 * count, activations, batch, length, a, c)


def _four_bit_bytes(model: nn.Module, frozen: Sequence[nn.Parameter]) -> int:
    """Bytes of a base in NF4: its linear layers but those of the head; the rest is float32, as PEFT prepares it."""
    from ziggurat.training.model.base import is_quantised_linear

    packed = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and is_quantised_linear(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
    }
    total = 0.0
    for p in frozen:
        total += p.numel() * (0.5 + 1 / 64 + 4 / (64 * 256) if id(p) in packed else 4)
    return round(total)


def _inputs(model: nn.Module, length: int, step: Step) -> dict[str, Tensor]:
    labels = step.labels

    def ids(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.ones(shape, dtype=dtype, device="meta")

    inputs = {"input_ids": ids(1, 2, length) if step.pair else ids(1, length)}
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids(1, length)
    if labels == "tokens":
        inputs["labels"] = ids(1, length)
    elif labels == "classes":
        inputs["labels"] = ids(1)
    elif labels == "values":
        inputs["labels"] = ids(1, dtype=torch.float32)
    return inputs
