"""Tensors over memory that someone else owns."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

# The array interface knows no bfloat16: it travels as the integers of its bits.
_TYPES = {
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "<i2",
    torch.int8: "|i1",
    torch.uint8: "|u1",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.bool: "|b1",
}


class _Memory:
    """What torch reads a foreign array from."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


def view_memory(pointer: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor over `pointer`, which lies on `device` and outlives it; nothing is copied.

    An empty tensor has no memory: the pointer is not looked at.
    """
    shape = tuple(shape)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        raw = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(pointer)
        return torch.frombuffer(raw, dtype=dtype).view(shape)
    interface = {"shape": shape, "typestr": _TYPES[dtype], "data": (pointer, False), "version": 3}
    tensor = torch.as_tensor(_Memory(interface), device=device)
    return tensor.view(dtype) if dtype is torch.bfloat16 else tensor
