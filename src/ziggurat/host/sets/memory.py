"""Adapters of one bank in one model: the tensors that they have in common lie in memory once.

Those tensors are frozen, so no training changes them, and whatever is loaded into one adapter passes here first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ziggurat.host.base.unwrap import unwrap
from ziggurat.host.method import Method
from ziggurat.host.method_layer import stores_at
from ziggurat.host.saved.names import bare_name


def held_once(method: Method, model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, by the names of a model's state dict, which is about to be loaded into `adapter`.

    A frozen tensor that another adapter has already, bitwise, becomes that one, in `adapter` and in the result.
    Where `state` differs from a tensor that `adapter` held together with others, it gets one of its own.
    """
    loaded = dict(state)
    names = {bare_name(name): name for name in loaded}
    for path, stores in stores_at(unwrap(model)[0], method, adapter):
        buffers = stores[adapter]._buffers
        others = [factors._buffers for other, factors in stores.items() if other != adapter]
        for leaf, old in buffers.items():
            name = names.get(f"{path}.{method.store}.{adapter}.{leaf}")
            if name is None or old is None:
                continue
            held = {id(tensor): tensor for table in others if (tensor := table.get(leaf)) is not None}
            same = next((tensor for tensor in held.values() if _same(tensor, loaded[name], old.dtype)), None)
            if same is not None:
                buffers[leaf] = loaded[name] = same
            elif id(old) in held:
                buffers[leaf] = torch.empty_like(old)
    return loaded


def _same(held: Tensor, new: Tensor, dtype: torch.dtype) -> bool:
    alike = held.dtype == new.dtype == dtype and held.shape == new.shape and not held.is_meta
    return alike and torch.equal(held, new.to(held.device))
