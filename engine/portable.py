"""Our ops as standard operators: a program in which each call of an op is what the op's definition consists of.

The definition is the op's reference, or its own `portable` where the reference cannot be traced. It is traced as it is,
with sizes as symbols, and with float32 where it says float64: a GPU has few double units, and TensorRT no doubles.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode

from planmill.engine.capture import Captured, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.kernels.common.spec import NAMESPACE, OpSpec

_TINY = torch.finfo(torch.float32).tiny
_WAY_OUT = "build with plugins python or aot, or with target aoti"


def lower(captured: Captured, specs: Iterable[OpSpec]) -> Captured:
    """The same model without ops of ours.

    Args:
        captured: the model.
        specs: the ops in it.

    Raises:
        PlanError: an op that has no form in standard operators; names it and says why.
    """
    symbols = symbols_of(captured)
    table = {}
    for spec in specs:
        if spec.no_portable:
            raise PlanError(f"op {NAMESPACE}::{spec.name} has no form without plugins: {spec.no_portable}: {_WAY_OUT}")
        table[spec.op] = _traced(spec, symbols)
    if not table:
        return captured
    try:
        with quiet_copies(), torch.no_grad():
            program = captured.program.run_decompositions(table)
    except AssertionError as error:  # how torch says that a definition writes into a tensor
        names = ", ".join(f"{NAMESPACE}::{op._opname}" for op in table)
        raise PlanError(f"one of {names} cannot become standard operators: {first_line(error)}: {_WAY_OUT}") from error
    return replace(captured, program=program)


def symbols_of(captured: Captured) -> dict[str, str]:
    """torch's symbol of each dynamic dimension -> the dimension's name."""
    values = {node.name: node.meta["val"] for node in captured.program.graph.nodes if "val" in node.meta}
    inputs = [values[name] for name in captured.program.graph_signature.user_inputs if isinstance(name, str)]
    return {
        str(size.node.expr): name
        for spec, value in zip(captured.inputs, inputs, strict=True)
        for name, size in zip(spec.shape, value.shape, strict=True)
        if isinstance(size, torch.SymInt) and name in captured.dynamic
    }


def _traced(spec: OpSpec, symbols: dict[str, str]) -> Callable[..., Any]:
    """The definition as torch's decompositions call it; a reason not to trace it becomes one PlanError."""
    definition = spec.load(spec.portable) if spec.portable else spec.reference

    def decompose(*args: Any, **kwargs: Any) -> Any:
        every: list[Any] = [size for a in args if isinstance(a, torch.Tensor) for size in a.shape]
        sizes = [(size, str(size.node.expr)) for size in every if isinstance(size, torch.SymInt)]
        cannot = f"op {NAMESPACE}::{spec.name} cannot become standard operators"
        try:
            with _SinglePrecision():
                found = definition(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise PlanError(f"{cannot}: {first_line(error)}: {_WAY_OUT}") from error
        for size, symbol in sizes:
            if symbol in symbols and is_concrete_int(size):
                raise PlanError(f"{cannot}: its definition fixes {symbols[symbol]} to one size: {_WAY_OUT}")
        return found

    return decompose


class _SinglePrecision(TorchFunctionMode):
    """float32 for float64, and operators that ONNX has for those that it lacks."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.double:
            return args[0].float()
        args = tuple(_single(a) for a in args)
        kwargs = {key: _single(a) for key, a in (kwargs or {}).items()}
        stand_in = _STAND_INS.get(func)
        return stand_in(*args, **kwargs) if stand_in else func(*args, **kwargs)


def _single(argument: Any) -> Any:
    if argument is torch.float64:
        return torch.float32
    if isinstance(argument, float) and 0 < abs(argument) < _TINY:
        return math.copysign(_TINY, argument)  # what keeps a divisor from zero has to go on doing so
    return argument


def _sort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Any:
    """TopK of everything: ONNX promises the lower index for equal values, which is a stable sort; TensorRT does not."""
    return torch.return_types.sort(torch.topk(x, x.shape[dim], dim, descending))


def _argsort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = False) -> torch.Tensor:
    return _sort(x, dim, descending)[1]


def _distances(x: torch.Tensor, y: torch.Tensor, p: float = 2.0, compute_mode: str = "") -> torch.Tensor:
    """Euclidean distances by differences, as `donot_use_mm_for_euclid_dist` computes them."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).sqrt()


def _amax(x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    """With every dimension named: the exporter of torch 2.13 asks for them."""
    return torch.amax(x, _every(x, dim), keepdim)


def _amin(x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    return torch.amin(x, _every(x, dim), keepdim)


def _at(find: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """argmax or argmin of one dimension as of two, which TensorRT asks for."""

    def found(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
        return find(x, dim, keepdim) if x.dim() != 1 else find(x[None], 1, keepdim)[0]

    return found


def _every(x: torch.Tensor, dim: Any) -> Any:
    return tuple(range(x.dim())) if dim == () else dim


def _searchsorted(ordered: torch.Tensor, values: torch.Tensor, *, right: bool = False) -> torch.Tensor:
    """How many are below (or, right, not above) each value, by comparing all with all."""
    below = ordered[..., None, :] <= values[..., None] if right else ordered[..., None, :] < values[..., None]
    return below.sum(-1)


def _getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
    """Indices in int64, which ONNX's GatherND asks for; those in a list as values of the graph."""
    many = index if isinstance(index, tuple) else (index,)
    return torch.Tensor.__getitem__(x, tuple(_index(x, i) for i in many))


def _index(x: torch.Tensor, index: Any) -> Any:
    if isinstance(index, list) and all(isinstance(i, int) for i in index):
        return _tensor(index, dtype=None if index else torch.int64, device=x.device)
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int32, torch.int16, torch.int8):
        return index.long()
    return index


def _tensor(data: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> torch.Tensor:
    """Numbers as values of the graph: torch writes into what it makes of them in one piece."""
    dtype = dtype or _kind(data)
    if isinstance(data, (list, tuple)):
        values = [_tensor(value, dtype=dtype, device=device) for value in data]
        return torch.stack(values) if values else torch.zeros(0, dtype=dtype, device=device)
    return torch.full((), data, dtype=dtype, device=device)


def _kind(data: Any) -> torch.dtype:
    """The dtype that torch.tensor takes for numbers."""
    kinds = {_kind(value) for value in data} if isinstance(data, (list, tuple)) else {type(data)}
    if not kinds or kinds & {float, torch.float32}:
        return torch.float32
    return torch.bool if kinds <= {bool, torch.bool} else torch.int64


_STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.sort: _sort,
    torch.Tensor.sort: _sort,
    torch.argsort: _argsort,
    torch.Tensor.argsort: _argsort,
    torch.cdist: _distances,
    torch.amax: _amax,
    torch.Tensor.amax: _amax,
    torch.amin: _amin,
    torch.Tensor.amin: _amin,
    torch.argmax: _at(torch.argmax),
    torch.Tensor.argmax: _at(torch.argmax),
    torch.argmin: _at(torch.argmin),
    torch.Tensor.argmin: _at(torch.argmin),
    torch.searchsorted: _searchsorted,
    torch.tensor: _tensor,
    torch.Tensor.__getitem__: _getitem,
}
