"""The regulariser in the loss: a hook on the model's root adds it if the model returns a loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ziggurat.errors import ConfigError
from ziggurat.host.older import trainer_counts_shifted_labels
from ziggurat.host.root_hook import RootHook, hooks_of
from ziggurat.methods.lora2.layer import Directions
from ziggurat.methods.lora2.orthogonality import Planes, cross_plane, orthogonality


def learning_linear_layers(model: nn.Module) -> dict[str, list[Directions]]:
    """Adapter -> the linear layers where it is active, trains, and has a direction left."""
    learning: dict[str, list[Directions]] = {}
    for layer in model.modules():
        if isinstance(layer, Directions):
            for adapter in layer.learning:
                if layer.factor(adapter, "U").dim() < 2:
                    raise ConfigError(
                        f"LoRA²'s regulariser reads the factors outside of their layers, and U of adapter {adapter!r} "
                        "is a flat shard there, as FSDP1 has it: use FSDP2 (fsdp_version: 2)."
                    )
                if layer.factor(adapter, "E").numel():
                    learning.setdefault(adapter, []).append(layer)
    return learning


def deviation(model: nn.Module) -> Tensor:
    """The factors' deviation from orthonormality, unweighted, averaged over all that train. See `orthogonality`."""
    return orthogonality(
        [_whole_planes(layer, a) for a, layers in learning_linear_layers(model).items() for layer in layers]
    )


def penalty(model: nn.Module) -> Tensor | None:
    """LoRA²'s regularisation term: config.orthogonality * deviation + config.cross_plane * cross-plane norm.

    Summed over the adapters that train; None if there are none. The hook adds it to a loss that the model returns. Add
    it yourself to a loss that is computed outside the model.
    """
    total: Tensor | None = None
    for adapter, layers in learning_linear_layers(model).items():
        config, planes = layers[0].configs[adapter], [_whole_planes(layer, adapter) for layer in layers]
        for weight, measure in ((config.orthogonality, orthogonality), (config.cross_plane, cross_plane)):
            if weight:
                part = weight * measure(planes)
                total = part if total is None else total + part.to(total.device)
    return total


def _whole_planes(layer: Directions, adapter: str) -> Planes:
    """The gathered factors: outside a layer's forward FSDP2 leaves them sharded, and expects sharded gradients."""
    return Planes(*(_whole(factor) for factor in layer.planes(adapter)))


def _whole(factor: Tensor) -> Tensor:
    """All of a factor. The gradient that comes back is averaged over the processes, as FSDP2 does with all others."""
    if not hasattr(factor, "full_tensor"):
        return factor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(factor, DTensor)
    whole = factor.full_tensor(grad_placements=[Partial()] * factor.device_mesh.ndim)
    if whole.requires_grad:
        processes = factor.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


class Regulariser(RootHook):
    """A forward hook on the base model's root: adds `penalty` to the loss that the model returns, while training.

    In evaluation, and if the output holds no loss, it changes nothing. `joined` tells whether a backward has gone
    through a penalty since it was last set to False: TRL and label smoothing compute another loss and ignore the
    model's.
    """

    joined = False

    def put_on(self, root: nn.Module) -> None:
        root.register_forward_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = _loss_of(output, kwargs)
        added = penalty(model) if loss is not None else None
        if loss is None or added is None:
            return None
        added = added * _share(model, kwargs)
        if torch.compiler.is_compiling():
            self.joined = True  # a hook on a tensor would break the graph
        else:
            added.register_hook(self._note)
        return _with_loss(output, loss + added.to(loss.device, loss.dtype))

    def _note(self, gradient: Tensor | None) -> None:
        # DDP with unused parameters runs a backward through every output of the model, with no gradient for an unused
        # loss. A zero gradient comes from a process without rows.
        self.joined = self.joined or gradient is not None


def hook_of(model: Any) -> Regulariser | None:
    """The regulariser's hook on `model` or on a module inside it; None where there is none, or no module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    hooks = (hook for module in modules for hook in hooks_of(module).values())
    return next((hook for hook in hooks if isinstance(hook, Regulariser)), None)


def _loss_of(output: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    loss: Any
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output and kwargs.get("labels") is not None:
        loss = output[0]
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
    else:
        output.loss = loss
    return output


def _share(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | float:
    """This forward's share of an optimiser step, if its loss is a sum over the step; else 1.

    transformers' Trainer gives `num_items_in_batch`, the number of labels in all micro-batches (and
    processes) of a step, and then *sums* their losses. So each takes the share of the labels it holds;
    over the step they make 1. Without it the Trainer averages the losses, and 1 is right.
    """
    number: Any = kwargs.get("num_items_in_batch")
    labels: Any = kwargs.get("labels")
    if number is None or not isinstance(labels, Tensor):
        return 1.0
    if isinstance(kwargs.get("shift_labels"), Tensor):
        labels = kwargs["shift_labels"]
    elif (
        LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
        and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        and trainer_counts_shifted_labels()
    ):
        labels = labels[..., 1:]
    count = labels.ne(-100).sum().float()
    total = number.to(count.device).float().max() if isinstance(number, Tensor) else float(number)
    return count / total
