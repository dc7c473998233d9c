"""The size of an adapter's file before it exists: safetensors' format is simple enough to be counted exactly."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the safetensors file with these tensors: 8 for the header's length, the header, the data.

    The header is JSON without spaces, filled up to a multiple of 8; tensors are sorted by item size, the largest first,
    then by name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + end
