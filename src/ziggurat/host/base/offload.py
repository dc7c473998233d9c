"""The device of modules whose weights accelerate keeps on disk, or on another device, between forwards."""

import torch
from torch import nn

from ziggurat.errors import ConfigError


def runs_on(module: nn.Module) -> torch.device | None:
    """The device to which accelerate's hooks bring weights of `module` for a forward; None where they stay in place.

    Between forwards such weights are on the meta device, where an adapter put beside them would have no values.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if getattr(each, "offload", False) and device is not None:
                return torch.device(device)
    return None


def check_in_place(module: nn.Module, path: str) -> None:
    """Raise ConfigError where the weights of the router or experts at `path` are brought in by accelerate's hooks.

    The hooks fetch them for the module's own forward, and an adapter reads them outside of it.
    """
    if runs_on(module) is not None:
        raise ConfigError(
            f"{path!r} ({type(module).__name__}) is offloaded by accelerate: its weights are fetched from the "
            "processor or disk for its own forward, and an adapter of a router or of fused experts can't use them. "
            "Load the model with a device_map that keeps this layer on a device, or leave it out of target_modules and "
            "target_parameters."
        )
