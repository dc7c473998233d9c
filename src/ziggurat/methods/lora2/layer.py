"""LoRA²'s adapted layers: the state of their directions during pruning."""

from typing import Any

import torch
from torch import Tensor, nn

from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method_layer import MethodLayer
from ziggurat.host.tensors import Factors, whole
from ziggurat.methods.lora2.importance import Importance
from ziggurat.methods.lora2.orthogonality import Planes


class Directions(MethodLayer):
    """`importance` holds the averages of the pruning, `masks` the mask of the last one, `final` the adapters whose mask
    stays as it is. None of these three is a parameter or buffer: they belong to the run, not to the adapter.

    At a parameter with all experts of a layer, tensors and masks have the experts in front: E (experts, r).
    """

    other_param_names = (*MethodLayer.other_param_names, "importance", "masks", "final")

    def _begin(self) -> None:
        super()._begin()
        self.importance: dict[str, Importance] = {}
        self.masks: dict[str, Tensor] = {}
        self.final: dict[str, bool] = {}

    def factor(self, adapter: str, key: str) -> nn.Parameter:
        """The factor called `key`: U, V, E, v or u."""
        return self.stores[adapter][key]  # type: ignore[index,return-value]

    def has_planes(self, adapter: str) -> bool:
        """Whether `adapter` has LoRA²'s factors here: a blend of adapters has one plain pair instead."""
        return "E" in self.stores[adapter]  # type: ignore[operator]

    def planes(self, adapter: str) -> Planes:
        """The four factors of `adapter`."""
        t = self.stored(adapter)
        return Planes(t["U"], t["V"], t["v"], t["u"])

    @property
    def learning(self) -> list[str]:
        """The active adapters whose factors train here."""
        return [name for name in self.acting() if self.has_planes(name) and self.factor(name, "E").requires_grad]

    def begin(self, adapter: str) -> None:
        """Reset the state of the directions, which an earlier run may have left."""
        for table in (self.importance, self.masks, self.final):
            table.pop(adapter, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for adapter, mask in list(self.masks.items()):
            E = state_dict.get(f"{prefix}{self.method.store}.{adapter}.E")
            if E is not None and E.shape == mask.shape and bool((E[~mask.to(E.device)] != 0).any()):
                self.begin(adapter)  # the mask belongs to other weights
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def clear_pruned(self, adapter: str) -> None:
        """E_i <- 0 for the directions that the last pruning has not kept."""
        if adapter in self.masks:
            E = self.factor(adapter, "E")
            mask = self.masks[adapter] = self.masks[adapter].to(E.device)
            E.masked_fill_(_laid_out_as(E, ~mask), 0)

    def alive(self, adapter: str) -> Tensor:
        """The mask of active directions, in E's shape: E_i isn't 0. Where FSDP2 shards E, all processes must call
        this."""
        return whole(self.factor(adapter, "E")) != 0

    @torch.no_grad()
    def drop(self, adapter: str, alive: Tensor) -> int:
        """Keep the directions in `alive` and drop the others, as new parameters; returns how many remain.

        Every expert keeps as many directions as the expert with the most.
        """
        factors: Factors = self.stores[adapter]  # type: ignore[assignment]
        remaining = most_alive(alive)
        k = factors["U"].shape[-2] if remaining else 0
        order = torch.sort(alive.int(), dim=-1, descending=True, stable=True).indices[..., :remaining]
        small = {
            "U": factors["U"][..., :k, :],
            "V": factors["V"].take_along_dim(order.unsqueeze(-1), -2)[..., :k],
            "E": factors["E"].take_along_dim(order, -1),
            "v": factors["v"].take_along_dim(order.unsqueeze(-2), -1)[..., :k, :],
            "u": factors["u"][..., :k],
        }
        for key, tensor in small.items():
            factors.put(key, tensor.clone())
        self.begin(adapter)
        return remaining


class LoRA2Linear(Directions, AdaptedLinear):
    """LoRA²'s adapted linear layer."""


def most_alive(alive: Tensor) -> int:
    """The number of directions in `alive`; of experts, that of the one with the most."""
    return int(alive.sum(-1).max())


def _laid_out_as(E: Tensor, mask: Tensor) -> Tensor:
    """`mask`, which every process has whole, sharded like E."""
    if not hasattr(E, "full_tensor"):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(E, DTensor)
    everywhere = [Replicate()] * E.device_mesh.ndim
    return DTensor.from_local(mask, E.device_mesh, everywhere, run_check=False).redistribute(placements=E.placements)
