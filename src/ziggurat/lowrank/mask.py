"""Dropout masks: drawn cheaply, kept as bits.

Torch's own dropout costs about as much on a CPU as the frozen d x d product it stands beside, because it
draws one number per entry from a serial generator. Here torch's generator gives one seed per mask, a small
fast generator of numpy's fills it with 16 random bits per entry, and the mask is kept packed, 1/32 of a
float32 copy. Seeding from torch's default generator is what makes `torch.manual_seed` and the recomputation
under gradient checkpointing give the same mask again. Processes that train together have mostly seeded it alike, so
each adds its rank: their rows are dropped by masks of their own.
"""

import numpy as np
import torch
from torch import Tensor

_STEPS = 1 << 16  # the probability is a multiple of 1 / _STEPS
_APART = 1_000_003  # entries by which the masks of two processes are shifted against each other on a device
_BLOCK = 1 << 17  # entries drawn at a time: their random bits stay in the processor's cache


def threshold(p: float) -> int:
    """An entry is dropped if its 16 random bits are below this."""
    return round(p * _STEPS)


def keep_scale(p: float) -> float:
    """The factor of the kept entries, ``1 / (1 - p)``, for the p that is drawn; 0 for p = 1.

    p is rounded to a multiple of 2^-16, so the expectation of dropout(x) is x exactly.
    """
    kept = _STEPS - threshold(p)
    return _STEPS / kept if kept else 0.0


def rank() -> int:
    """This process's number in its process group; 0 without one."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return 0 if alone else torch.distributed.get_rank()


def draw(x: Tensor, p: float) -> Tensor:
    """A new mask for the entries of x, each dropped with probability p; to be read by `apply` only.

    On the CPU one bit per entry, elsewhere one byte. Advances torch's default generator of x's device.
    """
    if x.device.type != "cpu":
        mask = torch.empty(x.numel(), dtype=torch.bool, device=x.device).bernoulli_(1 - threshold(p) / _STEPS)
        return mask.roll(rank() * _APART) if rank() else mask
    generator = np.random.SFC64([int(torch.empty((), dtype=torch.int64, device="cpu").random_()), rank()])
    size, below = x.numel(), threshold(p)
    bits = np.empty((size + 7) // 8, dtype=np.uint8)
    for start in range(0, size, _BLOCK):
        count = min(_BLOCK, size - start)
        words = generator.random_raw((count + 3) // 4).view(np.uint16)[:count]
        bits[start // 8 : (start + count + 7) // 8] = np.packbits(words >= below)
    return torch.from_numpy(bits)


def kept(mask: Tensor, start: int, count: int) -> Tensor:
    """1 for each of ``count`` entries that is kept and 0 for each dropped, from entry ``start``, a multiple of 8."""
    if mask.device.type != "cpu":
        return mask[start : start + count]
    packed = mask.numpy()[start // 8 : (start + count + 7) // 8]
    return torch.from_numpy(np.unpackbits(packed, count=count))


def apply(x: Tensor, mask: Tensor, *, start: int = 0, in_place: bool = False) -> Tensor:
    """x with the dropped entries set to zero, the others as they are: multiply by `keep_scale` elsewhere.

    x may be a part of the mask's tensor, from its entry number ``start``, a multiple of 8.
    """
    ones = kept(mask, start, x.numel()).view(x.shape)
    return x.mul_(ones) if in_place else x * ones
