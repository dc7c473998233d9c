"""The tensors of a site: their description, their initialisation, and the module that holds them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt
from typing import Any, Self

import torch
from torch import Tensor, nn

from ziggurat.errors import ConfigError, with_article
from ziggurat.lowrank.pair import FactorPair

#: The smaller side of the largest weight that is decomposed exactly: about a second of one core.
EXACT_SVD = 1024


class Weight:
    """The frozen weight of a site, for an initialisation that starts from it. Read only when it is asked for."""

    def __init__(self, path: str, read: Callable[[], Tensor]) -> None:
        self.path, self._read = path, read
        self._svds: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def value(self) -> Tensor:
        """W (d_out, d_in) in float32 on the CPU, dequantised where it is quantised.

        Raises:
            ConfigError: the site has no weight that can be read.
        """
        try:
            return self._read().detach().float().cpu()
        except (AttributeError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"the weight of {self.path!r} can't be read ({error}), and this method starts from it. Choose other "
                "target_modules, or a base model whose weights are not quantised."
            ) from error

    def of(self, expert: int) -> "Weight":
        """The weight of one expert, where this is that of all experts of a layer."""
        return Weight(self.path, lambda: self._read()[expert])

    def svd(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_out, rank), S (rank), V^T (rank, d_in): the largest singular values of W and their vectors.

        Exact up to `EXACT_SVD` rows or columns. Above by randomised subspace iteration [Halko, Martinsson and Tropp
        2011, arXiv 0909.4061], which draws from torch's generator of the CPU.
        """
        if rank not in self._svds:
            W = self.value
            if min(W.shape) <= EXACT_SVD:
                U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            else:
                U, S, V = torch.svd_lowrank(W, q=min(rank + 10, *W.shape), niter=10)
                Vh = V.T
            self._svds[rank] = U[:, :rank], S[:rank], Vh[:rank]
        return self._svds[rank]


#: Fills a fresh tensor in place. The weight is that of the first site that asks for the tensor.
Init = Callable[[Tensor, Weight], Any]


def kaiming(tensor: Tensor, weight: Weight) -> None:
    """Uniform in [-1/sqrt(d), 1/sqrt(d)] with d the last side, as LoRA draws A.

    That is kaiming_uniform with a = sqrt(5): bound sqrt(6 / ((1 + a^2) d)).
    """
    bound = 1 / sqrt(tensor.shape[-1])
    tensor.uniform_(-bound, bound)


def gaussian(tensor: Tensor, weight: Weight) -> None:
    """Normal with standard deviation 1 / rank, the rank being the last side but one."""
    tensor.normal_(0.0, 1 / tensor.shape[0])


def zeros(tensor: Tensor, weight: Weight) -> None:
    """Zeros, as LoRA's B: the fresh pair's delta is 0."""
    tensor.zero_()


def ones(tensor: Tensor, weight: Weight) -> None:
    """Ones, for vectors that scale."""
    tensor.fill_(1.0)


def normal(std: float) -> Init:
    """Normal with mean 0 and this standard deviation."""

    def draw(tensor: Tensor, weight: Weight) -> None:
        tensor.normal_(0.0, std)

    return draw


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a site.

    `shape`: as one linear layer has it. `init`: fills it in place; it may read the frozen weight.
    `shared`: "" for a tensor of this site alone; otherwise a name without dots, and all sites that give a tensor of
    this name and key share one. `trainable`: False keeps it as drawn; it is stored all the same.
    `seed`: the tensor is frozen and never stored: loading the adapter draws it again from this seed, with torch's
    generator of the CPU. `up`: it lies on the output side, as LoRA's B; LoRA+ has a separate rate for these.
    `experts`: at a parameter that holds all experts of a layer, the number of contiguous, equal groups of experts that
    have one of this tensor each, or the first expert of each group. None: one for every expert, or one for all if the
    tensor is shared.
    """

    shape: tuple[int, ...]
    init: Init = kaiming
    shared: str = ""
    trainable: bool = True
    seed: int | None = None
    up: bool = False
    experts: int | tuple[int, ...] | None = None

    @property
    def trains(self) -> bool:
        return self.trainable and self.seed is None

    @property
    def size(self) -> int:
        """The number of entries."""
        return prod(self.shape)

    def leaf(self, key: str) -> str:
        """The name of the tensor `key` among the parameters of its adapter."""
        return f"{self.shared}:{key}" if self.shared else key


def first_experts(groups: int, num_experts: int) -> tuple[int, ...]:
    """The first expert of each group where expert e of E is in group floor(e G / E)."""
    return tuple(-(-group * num_experts // groups) for group in range(groups))


def over_experts(spec: TensorSpec, num_experts: int) -> TensorSpec:
    """`spec` for all experts of a layer at once: groups of experts are the first side, unless all share one tensor."""
    groups = spec.experts if spec.experts is not None else 1 if spec.shared else num_experts
    starts = first_experts(groups, num_experts) if isinstance(groups, int) else groups

    def init(tensor: Tensor, weight: Weight) -> None:
        for part, first in zip(tensor.unbind() if len(starts) > 1 else (tensor,), starts, strict=True):
            spec.init(part, weight.of(first))

    shape = (len(starts), *spec.shape) if len(starts) > 1 else spec.shape
    return replace(spec, shape=shape, init=init, experts=starts)


def low_rank(
    rank: int, d_in: int, d_out: int, init_weights: bool | str, *, suffix: str = "", shared: str = ""
) -> dict[str, TensorSpec]:
    """`A` (rank, d_in) and `B` (d_out, rank), initialised as `init_weights` says.

    True: A uniform as LoRA's, B = 0. "gaussian": A normal with standard deviation 1 / rank, B = 0. False: both uniform,
    a pair that changes the model at once, for tests. `suffix` is appended to both keys.
    """
    down = gaussian if init_weights == "gaussian" else kaiming
    up = kaiming if init_weights is False else zeros
    return {
        f"A{suffix}": TensorSpec((rank, d_in), down, shared),
        f"B{suffix}": TensorSpec((d_out, rank), up, shared, up=True),
    }


@torch.no_grad()
def draw(spec: TensorSpec, weight: Weight, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """A fresh tensor. Drawn on the CPU and in float32, so that a seed gives the same adapter on every device.

    On the meta device nothing is drawn and no weight is read.
    """
    if device is not None and device.type == "meta":
        return torch.empty(spec.shape, device="meta", dtype=dtype)
    tensor = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
    if spec.seed is None:
        returned = spec.init(tensor, weight)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            returned = spec.init(tensor, weight)
    if isinstance(returned, Tensor) and returned.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        raise ConfigError(
            f"the init of a tensor of {weight.path!r} returned a new tensor, which is lost: fill the given one in "
            "place (tensor.copy_(...))."
        )
    return tensor.to(device=device, dtype=dtype)


def drawn_again(spec: TensorSpec, path: str, device: torch.device | None = None) -> Tensor:
    """A tensor with a seed, in float32, without the model: no file holds it.

    Raises:
        ConfigError: it starts from the frozen weight of `path`.
    """

    def no_model() -> Tensor:
        raise ValueError("the model isn't loaded")

    return draw(spec, Weight(path, no_model), device, None)


def tier_of(key: str) -> str:
    """The tier of a tensor by its key, `<factor>_<tier>`, or its name, `...:<key>`; "" where the key names none."""
    return key.rpartition(":")[2].partition("_")[2]


def is_named(key: str, names: Collection[str]) -> bool:
    """Whether `names`, tiers or single tensors by their keys, include the tensor called `key`."""
    return key in names or tier_of(key) in names


class Factors(nn.Module):
    """The tensors of one adapter at one place: parameters that train, buffers that don't, by leaf name."""

    def add(self, leaf: str, spec: TensorSpec, tensor: Tensor) -> None:
        """Hold `tensor` under the name `leaf`."""
        if spec.trains:
            self.register_parameter(leaf, nn.Parameter(tensor))
        else:
            self.register_buffer(leaf, tensor, persistent=spec.seed is None)

    def __contains__(self, leaf: str) -> bool:
        return leaf in self._parameters or leaf in self._buffers

    def __getitem__(self, leaf: str) -> Tensor:
        tensor = self._parameters[leaf] if leaf in self._parameters else self._buffers[leaf]
        assert tensor is not None
        return tensor

    def put(self, leaf: str, tensor: Tensor) -> None:
        """Replace the tensor called `leaf` by one of another shape. A parameter stays as trainable as it was."""
        if leaf in self._parameters:
            self._parameters[leaf] = nn.Parameter(tensor, requires_grad=self[leaf].requires_grad)
        else:
            self._buffers[leaf] = tensor

    def take(self, leaf: str, other: "Factors") -> None:
        """Share the tensor called `leaf` with `other`: both hold the same object."""
        for target, source in ((self._parameters, other._parameters), (self._buffers, other._buffers)):
            target.pop(leaf, None)
            if leaf in source:
                target[leaf] = source[leaf]  # type: ignore[assignment]

    def names(self) -> list[str]:
        """The leaf names, in the order of their creation."""
        return [*self._parameters, *self._buffers]

    def forward(self, leaves: Collection[str]) -> list[Tensor]:
        """The tensors of these names. A call, so that hooks which gather shards run first."""
        return [self[leaf] for leaf in leaves]

    def widen(self) -> None:
        """Convert frozen tensors of 16 bits to float32, as PEFT does with parameters."""
        for leaf, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[leaf] = buffer.float()

    def move(self, device: torch.device) -> None:
        """Move tensors from the CPU to `device`; nothing moves to the meta device."""
        if device.type in ("cpu", "meta"):
            return
        for parameter in self.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.to(device)
        for leaf, buffer in self._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                self._buffers[leaf] = buffer.to(device)


class ByAdapter(nn.ModuleDict):
    """Adapter -> `Factors`, at one place. A frozen tensor that several have stays one when it moves or is cast."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        holders: dict[int, list[tuple[Factors, str]]] = {}
        for factors in self.values():
            for leaf, buffer in factors._buffers.items():
                holders.setdefault(id(buffer), []).append((factors, leaf))  # type: ignore[arg-type]
        for _, *others in holders.values():
            for factors, leaf in others:
                factors._buffers[leaf] = None
        super()._apply(fn, recurse)
        for (first, first_leaf), *others in holders.values():
            for factors, leaf in others:
                factors._buffers[leaf] = first._buffers[first_leaf]
        return self


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, where FSDP2 has sharded it; all processes must ask."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()  # type: ignore[operator]


def check_pair(pair: FactorPair, d_in: int, d_out: int, where: str) -> None:
    """Raise ConfigError unless `pair` is A (rank, d_in) and B (d_out, rank); batched pairs have experts in front."""
    if not isinstance(pair, FactorPair):
        raise ConfigError(
            f"{where}: the method's `pair` returned {with_article(type(pair).__name__)}; FactorPair(A, B) is needed."
        )
    A, B = pair
    if A.shape[-1:] == (d_in,) and B.shape[-2:-1] == (d_out,) and A.shape[-2:-1] == B.shape[-1:]:
        return
    raise ConfigError(
        f"{where}: the pair has A {tuple(A.shape)} and B {tuple(B.shape)}; A (rank, {d_in}) and B ({d_out}, rank) are "
        "needed. Mend the method's `pair`, or the shapes in its `tensors`."
    )
