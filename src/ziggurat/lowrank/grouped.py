"""Products of rows with the matrix of their group: tokens, sorted by expert, with the weight of their expert."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

#: torch's kernel needs matrix sides of a multiple of this many bytes.
_ALIGNED = 16


def grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """y_s = x_s W_g(s): row s of x (rows, d_in) by the matrix in W (groups, d_in, d_out) of the group that it is in.

    `ends` (groups): the number of rows in each group and all before it; the last one is the number of rows. By torch's
    grouped_mm where it knows the device and the dtype, and by one batched product of padded groups elsewhere. In
    torch.compile, which knows that kernel for bfloat16 alone and no sizes that data decide, by transformers' operation.
    """
    if x.is_meta:
        return x @ W[0]  # the shapes and what autograd keeps are the same; how many rows a group has isn't known
    compiled = torch.compiler.is_compiling()
    aligned = all(side * W.element_size() % _ALIGNED == 0 for side in W.shape[1:])
    supported = W.dtype == torch.bfloat16 or not compiled
    if aligned and supported and x.dtype == W.dtype and _has_kernel(x.device.type, W.dtype):
        return F.grouped_mm(x, W, offs=ends)
    if compiled:
        return torch.ops.transformers.grouped_mm_fallback(x.to(W.dtype), W, ends)
    return _padded(x, W, ends)


def _padded(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    starts = F.pad(ends[:-1], (1, 0))
    longest = int((ends - starts).max())
    rows = torch.arange(len(x), device=x.device)
    group = torch.searchsorted(ends, rows.to(ends.dtype), right=True)
    place = group * longest + rows - starts[group]
    filled = x.new_zeros(len(W) * longest, x.shape[-1]).index_copy(0, place, x)
    return (filled.view(len(W), longest, -1) @ W).flatten(0, 1)[place]


@cache
@torch.compiler.assume_constant_result
def _has_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's grouped_mm works here, forward and backward: its support has changed often."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode asks first
            x, W = (torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in ((8, 8), (2, 8, 8)))
            y = F.grouped_mm(x, W, offs=torch.tensor([3, 8], device=device, dtype=torch.int32))
            torch.autograd.grad(y, (x, W), torch.ones_like(y))
    except (RuntimeError, NotImplementedError):
        return False
    return True
