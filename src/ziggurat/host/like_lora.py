"""Functions that PEFT offers for LoRA only, for every method: swapping an adapter in place, and LoRA+'s two rates."""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import loaded_tensors
from ziggurat.host.config import MethodConfig
from ziggurat.host.method import specs_of
from ziggurat.host.method_layer import layers_of
from ziggurat.host.saved.folder import adapter_config
from ziggurat.host.saved.names import current_names
from ziggurat.host.values import NO_MATTER, shown


def hotswap_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Give `adapter_name` the weights of the adapter in `folder`, in place: no module and no tensor is made anew.

    So a compiled model isn't compiled again. PEFT's `hotswap_adapter` does this for LoRA alone.

    Raises:
        ConfigError: the adapters differ in a field that decides the update (rank, alpha, targets, ...), the file
            doesn't hold the same tensors, the adapter is merged, or it shares tensors with others of the model that
            would change with it. Nothing is changed then.
    """
    if adapter_name not in model.peft_config:
        raise ConfigError(f"no adapter {adapter_name!r} to swap; the model has {', '.join(model.peft_config)}.")
    if not isinstance(model.peft_config[adapter_name], MethodConfig):
        kind = type(model.peft_config[adapter_name]).__name__
        raise ConfigError(
            f"adapter {adapter_name!r} is none of ziggurat's methods ({kind}): use PEFT's hotswap_adapter."
        )
    old, new = (config.to_dict() for config in (model.peft_config[adapter_name], adapter_config(folder)))
    different = sorted(
        name for name in old.keys() | new.keys() if name not in NO_MATTER and old.get(name) != new.get(name)
    )
    if different:
        first = different[0]
        raise ConfigError(
            f"{folder} can't be swapped for adapter {adapter_name!r}: {', '.join(different)} differ ({first}: "
            f"{shown(old.get(first))} here, {shown(new.get(first))} there). Load it under another name."
        )
    layers = list(layers_of(model))
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ConfigError(f"adapter {adapter_name!r} is merged into the weights: call unmerge_adapter() first.")
    state = current_names(loaded_tensors(folder), layers[0].method)
    held = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for name in sorted(state.keys() | held.keys()):
        in_model, in_file = (tuple(table[name].shape) if name in table else "nothing" for table in (held, state))
        if in_model != in_file:
            raise ConfigError(f"{folder} can't be swapped in: {name} has {in_file} there, and the model {in_model}.")
    everything = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    names = Counter(tensor.data_ptr() for _, tensor in everything)
    common = [name for name in state if names[held[name].data_ptr()] > 1]
    if changed := [name for name in common if not torch.equal(state[name].to(held[name]), held[name])]:
        raise ConfigError(
            f"{folder} can't be swapped in: adapter {adapter_name!r} shares {len(common)} tensors with others of this "
            f"model, and {len(changed)} have other values there ({changed[0]}, ...). Load it under another name."
        )
    set_peft_model_state_dict(model, state, adapter_name=adapter_name)


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser in which the factors on the output side, LoRA's B, learn at `lr` times `loraplus_lr_ratio`.

    LoRA+ [Hayou et al. 2024, arXiv 2402.12354]: eta_B = ratio * eta_A. PEFT's function of this name looks for LoRA's
    parameter names, and would give the factors of other methods one rate. Other trainable parameters learn at `lr`.

    Raises:
        ConfigError: no trainable factor of `model` is on the output side.
    """
    up: set[int] = set()
    for layer in layers_of(model):
        for adapter in layer.leaves:
            specs = specs_of(layer.method, layer.configs[adapter], layer.sites[adapter])
            up |= {id(tensor) for key, tensor in layer.held(adapter).items() if specs[key].up}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(id(parameter) in up for parameter in trained):
        raise ConfigError(
            "LoRA+ gives the factors on the output side a rate of their own, and no such factor trains in this model."
        )
    groups = [
        {"params": [p for p in trained if id(p) not in up], "lr": lr},
        {"params": [p for p in trained if id(p) in up], "lr": lr * loraplus_lr_ratio},
    ]
    return optimizer_cls([group for group in groups if group["params"]], **kwargs)
