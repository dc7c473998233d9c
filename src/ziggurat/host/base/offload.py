"""The device of modules whose weights accelerate keeps on disk, or on another device, between forwards."""

import torch
from torch import nn


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
