"""Tensors as Ray carries them: arrays, which processes of a node read from shared memory without a copy."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Block:
    """A tensor as an array of numpy, and its dtype, which numpy may not know (bfloat16)."""

    array: Any
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Block":
        """The block of a tensor, of any device and strides."""
        tensor = tensor.detach().cpu().contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        return cls((tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy(), name)

    def tensor(self) -> torch.Tensor:
        """The tensor, on the same memory; only for reading where the block came from another process."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(self.array)
        return tensor.view(getattr(torch, self.dtype))
