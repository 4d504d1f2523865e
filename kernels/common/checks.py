"""Argument checks of the public functions: the message names the op, the argument, what was needed and what came."""

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_rank(op: str, name: str, x: torch.Tensor, rank: int, layout: str) -> None:
    """Raise ValueError unless `x` has `rank` dimensions; `layout` names them, e.g. "[N, P, C]"."""
    if x.dim() != rank:
        raise ValueError(f"{op}: {name} must be {layout}, got {list(x.shape)}")


def check_float(op: str, name: str, x: torch.Tensor) -> None:
    """Raise TypeError unless `x` is float32, bfloat16 or float16."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {x.dtype}")


def check_dtype(op: str, name: str, x: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise TypeError unless the dtype of `x` is one of `dtypes`."""
    if x.dtype not in dtypes:
        needed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {needed}, got {x.dtype}")


def check_device(op: str, name: str, x: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """Raise ValueError unless `x` is on the device of `first`."""
    if x.device != first.device:
        raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {x.device}")


def check_alike(op: str, name: str, x: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """Raise TypeError unless `x` has the dtype of `first`, ValueError unless it is on the same device."""
    if x.dtype is not first.dtype:
        raise TypeError(f"{op}: {name} must be {first.dtype} like {first_name}, got {x.dtype}")
    check_device(op, name, x, first_name, first)


def check_matrices(
    op: str, queries: torch.Tensor, database: torch.Tensor, names: tuple[str, str] = ("queries", "database")
) -> None:
    """Raise unless `queries` [n, D] and `database` [m, D] are float matrices of one width D >= 1, dtype and device."""
    if (
        queries.dim() == 2 == database.dim()
        and queries.dtype in FLOATS
        and database.dtype is queries.dtype
        and database.device == queries.device
        and database.shape[1] == queries.shape[1]
        and queries.shape[1] > 0
    ):
        return
    first, second = names
    check_rank(op, first, queries, 2, "[n, D]")
    check_rank(op, second, database, 2, "[m, D]")
    check_float(op, first, queries)
    check_alike(op, second, database, first, queries)
    if queries.shape[1] == 0:
        raise ValueError(f"{op}: {first} must be [n, D] with D at least 1, got {list(queries.shape)}")
    raise ValueError(f"{op}: {second} must be [m, {queries.shape[1]}] like {first}, got {list(database.shape)}")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_int32_range(op: str, name: str, rows: int) -> None:
    """Raise ValueError where an int32 index could not address `rows`."""
    if rows >= 2**31:
        raise ValueError(f"{op}: {name} must have fewer than 2^31 rows, got {rows}")
