"""The one table of methods: a new method joins the contracts by one row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ziggurat import (
    AdapterDropConfig,
    ASLoRAConfig,
    DyLoRAConfig,
    LoR2CConfig,
    LoRA2Config,
    LoRAXSConfig,
    MSPLoraConfig,
    ShareLoRAConfig,
    TiedLoRAConfig,
)
from zoo import ZOO, Zoo


@dataclass(frozen=True)
class Method:
    """What the contracts need to know of a method.

    `config`: makes its config for an architecture; `prefix`: what its parameters' names hold; `merges`:
    its update is one of weights, so that it can be merged and exported; `combines`: it has
    add_weighted_adapter; `takes_targets`: its config has target_modules; `kit`: it is its two functions and nothing
    else, so that what a tuner, layer or bank of its own could break needs no test on every model.
    """

    config: Callable[..., PeftConfig]
    prefix: str
    merges: bool = True
    combines: bool = True
    takes_targets: bool = True
    kit: bool = False


def _msplora(zoo: Zoo, **fields: Any) -> PeftConfig:
    return MSPLoraConfig(**{"r": 4, "target_modules": zoo.targets, "task_type": zoo.task_type, **fields})


def _lor2c(zoo: Zoo, **fields: Any) -> PeftConfig:
    return LoR2CConfig(**{"r": 4, "task_type": zoo.task_type, **fields})


def _lora2(zoo: Zoo, **fields: Any) -> PeftConfig:
    return LoRA2Config(**{"r": 4, "target_modules": zoo.targets, "task_type": zoo.task_type, **fields})


def _dylora(zoo: Zoo, **fields: Any) -> PeftConfig:
    return DyLoRAConfig(**{"r": 4, "target_modules": zoo.targets, "task_type": zoo.task_type, **fields})


def _sharelora(zoo: Zoo, **fields: Any) -> PeftConfig:
    return ShareLoRAConfig(**{"r": 4, "target_modules": zoo.targets, "task_type": zoo.task_type, **fields})


def _tiedlora(zoo: Zoo, **fields: Any) -> PeftConfig:
    return TiedLoRAConfig(**{"r": 4, "target_modules": zoo.targets, "task_type": zoo.task_type, **fields})


def _loraxs(zoo: Zoo, **fields: Any) -> PeftConfig:
    plain = {"r": 4, "init_weights": True, "target_modules": zoo.targets, "task_type": zoo.task_type}
    return LoRAXSConfig(**{**plain, **fields})


def _aslora(zoo: Zoo, **fields: Any) -> PeftConfig:
    plain = {"r": 4, "groups": 2, "target_modules": zoo.targets, "task_type": zoo.task_type}
    return ASLoRAConfig(**{**plain, **fields})


def _adapterdrop(zoo: Zoo, **fields: Any) -> PeftConfig:
    return AdapterDropConfig(**{"r": 4, "target_modules": zoo.targets, "task_type": zoo.task_type, **fields})


METHODS: dict[str, Method] = {
    "msplora": Method(_msplora, "msplora_"),
    "lor2c": Method(_lor2c, "lor2c_", merges=False, takes_targets=False),
    "lora2": Method(_lora2, "lora2_"),
    "dylora": Method(_dylora, "dylora_"),
    "sharelora": Method(_sharelora, "sharelora_", kit=True),
    "tiedlora": Method(_tiedlora, "tiedlora_", kit=True),
    "loraxs": Method(_loraxs, "loraxs_", kit=True),
    "aslora": Method(_aslora, "aslora_", kit=True),
    "adapterdrop": Method(_adapterdrop, "adapterdrop_", merges=False, combines=False),
}
if not hasattr(BaseTuner, "_get_adapter_state_dict"):
    # A PEFT that saves the factors alone: ASLoRA is refused there, see test_versions.py.
    del METHODS["aslora"]


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of a model's forward, whatever it is called."""
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


def enlarge(model: nn.Module, method: str) -> nn.Module:
    """The model with twice the method's numbers, for comparisons in 16 bits, where small adapters don't show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if METHODS[method].prefix in name:
                parameter.mul_(2)
    return model


def zoo_config(method: str, model: str, **fields: Any) -> PeftConfig:
    """The config of `method` for the architecture `model`."""
    return METHODS[method].config(ZOO[model], **fields)
