"""Argument checks of the public functions: the message names the op, the argument, what was needed and what came."""

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_rank(op: str, name: str, x: torch.Tensor, layout: str) -> None:
    """Raise ValueError unless `x` has as many dimensions as `layout`, e.g. "[N, P, C]"."""
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got {list(x.shape)}")


def check_float(op: str, **tensors: torch.Tensor) -> None:
    """Raise TypeError unless every tensor is float32, bfloat16 or float16 and all are of one dtype."""
    first = next(iter(tensors))
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != tensors[first].dtype:
            raise TypeError(f"{op}: {name} must be {tensors[first].dtype} like {first}, got {x.dtype}")
        if x.device != tensors[first].device:
            raise ValueError(f"{op}: {name} must be on {tensors[first].device} like {first}, got {x.device}")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_int32_range(op: str, name: str, rows: int) -> None:
    """Raise ValueError where an int32 index could not address `rows`."""
    if rows >= 2**31:
        raise ValueError(f"{op}: {name} must have fewer than 2^31 rows, got {rows}")
