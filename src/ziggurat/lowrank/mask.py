"""Dropout masks: drawn cheaply, kept as bits or as the numbers of the dropped entries.

Torch's own dropout costs about as much on a CPU as the frozen d x d product it stands beside, because it
draws one number per entry from a serial generator. Here torch's generator gives one seed per mask, and a small
fast generator of numpy's draws from it. Up to p = 1/8 it draws the gaps between dropped entries, which are few and
cheap to set to zero; above, it draws 16 random bits per entry, kept packed as one bit, 1/32 of a float32 copy. Seeding
from torch's default generator is what makes `torch.manual_seed` and the recomputation under gradient checkpointing give
the same mask again. Processes that train together have mostly seeded it alike, so each adds its rank: their rows are
dropped by masks of their own.
"""

import math
import threading

import numpy as np
import torch
from torch import Tensor

_STEPS = 1 << 16  # the probability is a multiple of 1 / _STEPS
_APART = 1_000_003  # entries by which the masks of two processes are shifted against each other on a device
_BLOCK = 1 << 17  # entries drawn at a time: their random bits stay in the processor's cache
_SPARSE = _STEPS // 8  # up to this threshold the dropped entries are numbered
_MOST = 1 << 29  # up to so many entries every number that is drawn fits int32
_MIXED = 12  # words to pass over until each of a new state's bits acts on all
_THREAD = threading.local()


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
    """A new mask for the entries of x, each dropped with probability p; to be read by `apply` and `kept` only.

    On the CPU the numbers of the dropped entries, int32 and ascending, where they are few, else one bit per entry;
    elsewhere one byte per entry. Advances torch's default generator of x's device.
    """
    if x.device.type != "cpu":
        mask = torch.empty(x.numel(), dtype=torch.bool, device=x.device).bernoulli_(1 - threshold(p) / _STEPS)
        return mask.roll(rank() * _APART) if rank() else mask
    source, size, below = _source(), x.numel(), threshold(p)
    if 0 < below <= _SPARSE and size <= _MOST:
        return torch.from_numpy(_numbers(source, size, below / _STEPS))
    bits = np.empty((size + 7) // 8, dtype=np.uint8)
    for start in range(0, size, _BLOCK):
        count = min(_BLOCK, size - start)
        words = source.bit_generator.random_raw((count + 3) // 4).view(np.uint16)[:count]
        bits[start // 8 : (start + count + 7) // 8] = np.packbits(words >= below)
    return torch.from_numpy(bits)


def _source() -> np.random.Generator:
    """This thread's generator, in a state that torch's generator and this process's rank determine.

    Setting the state takes a fraction of making a generator, which costs more than a small mask.
    """
    if (source := getattr(_THREAD, "source", None)) is None:
        source = _THREAD.source = np.random.Generator(np.random.SFC64(0))
    words = np.empty(4, dtype=np.uint64)
    words[:3] = torch.empty(3, dtype=torch.int64, device="cpu").random_().numpy()
    words[3] = 1 + rank()
    state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
    source.bit_generator.state = state
    source.bit_generator.random_raw(_MIXED, output=False)
    return source


def _numbers(source: np.random.Generator, size: int, p: float) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    """The numbers of the entries dropped among ``size``, each with probability p.

    The kept entries before each dropped one are geometric: floor(E / -ln(1 - p)) for an exponential E.
    """
    rate, last, parts = np.float32(-1 / math.log1p(-p)), -1, []
    while last < size:
        expected = (size - last) * p
        gaps = source.standard_exponential(int(expected + 4 * math.sqrt(expected) + 8), dtype=np.float32)
        gaps *= rate
        numbers = gaps.astype(np.int32)
        numbers += 1
        numbers[0] += last
        np.cumsum(numbers, dtype=np.int32, out=numbers)
        last = int(numbers[-1])
        parts.append(numbers[: numbers.searchsorted(np.int32(size))])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def kept(mask: Tensor, start: int, count: int) -> Tensor:
    """1 for each of ``count`` entries that is kept and 0 for each dropped, from entry ``start``, a multiple of 8."""
    if is_numbered(mask):
        return torch.ones(count, dtype=torch.uint8, device=mask.device).index_fill_(0, dropped(mask, start, count), 0)
    if mask.device.type != "cpu":
        return mask[start : start + count]
    packed = mask.numpy()[start // 8 : (start + count + 7) // 8]
    return torch.from_numpy(np.unpackbits(packed, count=count))


def is_numbered(mask: Tensor) -> bool:
    """Whether a mask holds the numbers of the dropped entries."""
    return mask.dtype == torch.int32


def dropped(mask: Tensor, start: int, count: int) -> Tensor:
    """The numbers of a numbered mask's dropped entries among ``count`` from entry ``start``, counted from there."""
    numbers = mask.numpy()
    first, end = (numbers.searchsorted(np.int32(number)) for number in (start, start + count))
    those = mask[first:end].long()
    return those.sub_(start) if start else those


def apply(x: Tensor, mask: Tensor, *, start: int = 0, out: Tensor | None = None) -> Tensor:
    """x with the dropped entries set to zero, the others as they are: multiply by `keep_scale` elsewhere.

    x may be a part of the mask's tensor, from its entry number ``start``, a multiple of 8. The result is in ``out``,
    which may be x and is contiguous.
    """
    if not is_numbered(mask):
        ones = kept(mask, start, x.numel()).view(x.shape)
        return x.mul_(ones) if out is x else torch.mul(x, ones, out=out)
    if out is None:
        out = x.clone(memory_format=torch.contiguous_format)
    elif out is not x:
        out.copy_(x)
    out.view(-1).index_fill_(0, dropped(mask, start, x.numel()), 0)
    return out
