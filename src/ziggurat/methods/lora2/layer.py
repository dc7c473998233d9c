"""LoRA²'s tuner layer: a linear with two nested planes, and what is known of its directions."""

from collections.abc import Collection

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.host.linear import AdaptedLinear
from ziggurat.lowrank.pair import FactorPair
from ziggurat.methods.lora2.config import LoRA2Config
from ziggurat.methods.lora2.importance import Importance
from ziggurat.methods.lora2.orthogonality import Planes

#: Standard deviation of the factors at the start.
INIT_STD = 0.02


class LoRA2Layer(BaseTunerLayer):
    """What marks a module as a tuner layer of LoRA²."""


class LoRA2Linear(AdaptedLinear, LoRA2Layer):
    """A linear whose update is scale (u v) diag(E) (V U).

    `lora2_U` (k, d_in), `lora2_V` (r, k), `lora2_E` (r), `lora2_v` (k, r), `lora2_u` (d_out, k), by adapter.
    `importance` holds the averages of the pruning, `kept` the mask of the last one, `final` the adapters whose mask
    stays as it is. None of these three is a parameter or buffer: they go with the run, not with the adapter.
    """

    lora2_U: nn.ParameterDict
    lora2_V: nn.ParameterDict
    lora2_E: nn.ParameterDict
    lora2_v: nn.ParameterDict
    lora2_u: nn.ParameterDict

    method = "lora2"
    adapter_layer_names = ("lora2_U", "lora2_V", "lora2_E", "lora2_v", "lora2_u")
    other_param_names = ("configs", "importance", "kept", "final")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: object) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, LoRA2Config] = {}
        self.importance: dict[str, Importance] = {}
        self.kept: dict[str, Tensor] = {}
        self.final: dict[str, bool] = {}

    def add(self, adapter: str, config: LoRA2Config, path: str) -> None:
        """Give this linear, which lies at `path`, the planes of `adapter`."""
        r, k = config.rank_at(path), config.outer_rank_at(self.in_features, self.out_features)
        k = k if r else 0  # no direction of the inner plane, no use for the outer one
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        shapes = ((k, self.in_features), (r, k), (r,), (k, r), (self.out_features, k))
        # Drawn on the CPU and in the default dtype, so that a seed gives the same adapter on every device.
        drawn_on = "meta" if device is not None and device.type == "meta" else "cpu"
        for name, shape in zip(self.adapter_layer_names, shapes, strict=True):
            drawn = _draw(torch.empty(shape, device=drawn_on), name == "lora2_E", config.init_weights)
            getattr(self, name)[adapter] = nn.Parameter(drawn.to(device=device, dtype=dtype))
        self.configs[adapter] = config
        self.final[adapter] = False

    @property
    def adapters(self) -> Collection[str]:
        return self.configs

    def planes(self, adapter: str) -> Planes:
        """The four factors of `adapter`."""
        return Planes(self.lora2_U[adapter], self.lora2_V[adapter], self.lora2_v[adapter], self.lora2_u[adapter])

    def effective_pair(self, adapter: str) -> FactorPair:
        """A = U (k, d_in), B = u (v diag(scale E) V) (d_out, k): the inner plane is folded into B, k x k."""
        U, V, v, u = self.planes(adapter)
        core = (v * (self.lora2_E[adapter] * self.configs[adapter].scale)) @ V
        return FactorPair(U, u @ core)

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        return *self.planes(adapter), self.lora2_E[adapter]

    def dropout(self, adapter: str) -> float:
        return self.configs[adapter].lora_dropout

    @property
    def learning(self) -> list[str]:
        """The active adapters whose factors train here."""
        active = [name for name in self.active_adapters if name in self.configs]
        return [] if self.disable_adapters else [name for name in active if self.lora2_E[name].requires_grad]

    @torch.no_grad()
    def clear_pruned(self, adapter: str) -> None:
        """E_i <- 0 for the directions that the last pruning has not kept."""
        if adapter in self.kept:
            E = self.lora2_E[adapter]
            kept = self.kept[adapter] = self.kept[adapter].to(E.device)
            E.masked_fill_(_laid_out_as(E, ~kept), 0)

    def alive(self, adapter: str) -> Tensor:
        """Which directions do something, (r): those whose E_i isn't 0. Where FSDP2 shards E, all processes must ask."""
        E = self.lora2_E[adapter].detach()
        return (E.full_tensor() if hasattr(E, "full_tensor") else E) != 0  # type: ignore[operator]

    @torch.no_grad()
    def drop(self, adapter: str, alive: Tensor) -> int:
        """Keep the directions in `alive` (r) and forget the others; how many are left. Their parameters are new."""
        U, V, v, u = self.planes(adapter)
        left = int(alive.sum())
        k = U.shape[0] if left else 0
        small = (U[:k], V[alive, :k], self.lora2_E[adapter][alive], v[:k, alive], u[:, :k])
        for name, factor in zip(self.adapter_layer_names, small, strict=True):
            old = getattr(self, name)[adapter]
            getattr(self, name)[adapter] = nn.Parameter(factor.clone(), requires_grad=old.requires_grad)
        for state in (self.importance, self.kept):
            state.pop(adapter, None)
        self.final[adapter] = False
        return left


def _laid_out_as(E: Tensor, mask: Tensor) -> Tensor:
    """`mask`, which every process has whole, in the pieces in which FSDP2 may have laid out E."""
    if not hasattr(E, "full_tensor"):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(E, DTensor)
    everywhere = [Replicate()] * E.device_mesh.ndim
    return DTensor.from_local(mask, E.device_mesh, everywhere, run_check=False).redistribute(placements=E.placements)


def check_ranks(config: LoRA2Config, path: str, d_in: int, d_out: int) -> None:
    """Raise ConfigError if the outer plane that was asked for has no room in a matrix of this shape."""
    if config.outer_rank is not None and config.outer_rank > min(d_in, d_out):
        raise ConfigError(
            f"outer_rank={config.outer_rank} is above the matrix: {path!r} maps {d_in} to {d_out}, so at most "
            f"{min(d_in, d_out)} directions can be orthonormal there. Lower outer_rank, leave it out (8, or less where "
            "a matrix is smaller), or leave the module out by exclude_modules."
        )


def _draw(empty: Tensor, is_E: bool, init: bool | str) -> Tensor:
    """E = 0 and factors N(0, 0.02^2), or for tests (`init` False) an update of about LoRA's usual size."""
    if init is False:
        return empty.uniform_(0.5, 1.0) if is_E else empty.normal_(0.0, max(empty.shape[-1], 1) ** -0.5)
    return empty.zero_() if is_E else empty.normal_(0.0, INIT_STD)
