"""What a training step needs: weights, what is trained with its gradients and AdamW's moments, saved activations.

Activations are counted, not guessed: one forward of the adapted model on the meta device, which computes nothing,
with every tensor that autograd would keep for the backward. Attention that asks torch for a fused kernel is counted as
one keeps it: inputs, output and one number a row, not the L x L weights. Per sample all grows as a L + c L^2 with the
length L (c is not 0 where attention is written out, or has a mask); two lengths give a and c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step. `activations` is None where the model can't be traced without weights.

    weights + 2 x trained (values and gradients) + 8 a trained number (AdamW's two moments in float32) + activations,
    with activations = batch (a L + c L^2). Not in it: the device's context, kernels' workspaces, fragmentation.
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
        """The activations' formula with its numbers, in bytes."""
        if self.activations is None:
            return "weights + 2 x trained + 8 a trained number; activations unknown"
        return f"batch x ({self.a:,.0f} L + {self.c:,.1f} L²) bytes"


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps between a forward on `inputs` and its backward, beside parameters and buffers.

    A tensor kept several times, or in several views, counts once. Works on any device, on meta without computing.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward, without computing anything."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        row_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, row_sums, *([] if mask is None else [mask]))
        return out


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch writes its attention out; here it is counted as the kernel that a device would run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_meta:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return _Fused.apply(*args[:3], mask)
        return func(*args, **kwargs)


def memory(model: nn.Module, batch: int, length: int, *, labels: str | None) -> Memory:
    """The estimate for an adapted model on the meta device. `labels`: "tokens", "classes", "values" or None."""
    everything = list({id(p): p for p in model.parameters()}.values())
    on = [p for p in everything if p.requires_grad]
    trained = sum(p.numel() * p.itemsize for p in on)
    weights = sum(p.numel() * p.itemsize for p in everything if not p.requires_grad)
    numbers = sum(p.numel() for p in on)
    a = c = 0.0
    activations = None
    model.train()
    try:
        half = max(length // 2, 1)
        short, whole = (float(saved_bytes(model, _inputs(model, n, labels))) for n in (half, length))
        if half < length:
            c = max(0.0, (whole / length - short / half) / (length - half))
        a = whole / length - c * length
        activations = round(batch * whole)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        # Some models look at values in their forward (masks, routing), and on the meta device there are none.
        pass
    return Memory(weights, trained, trained, 8 * numbers, activations, batch, length, a, c)


def _inputs(model: nn.Module, length: int, labels: str | None) -> dict[str, Tensor]:
    def ids(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.ones(shape, dtype=dtype, device="meta")

    inputs = {"input_ids": ids(1, length)}
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
