"""Our ops as standard operators: a program in which each call of an op is what the op's definition consists of.

The definition is the op's reference, or its own `portable` where the reference cannot be traced. It is traced as it is,
with sizes as symbols, and with float32 where it says float64: a GPU has few double units, and TensorRT no doubles.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from planmill.engine.capture import Captured, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.kernels.common.spec import NAMESPACE, OpSpec

_WAY_OUT = "build with plugins python or aot, or with target aoti"


def lower(captured: Captured, specs: Iterable[OpSpec]) -> Captured:
    """The same model without ops of ours.

    Args:
        captured: the model.
        specs: the ops in it.

    Raises:
        PlanError: an op that has no form in standard operators; names it and says why.
    """
    table = {}
    for spec in specs:
        if spec.no_portable:
            raise PlanError(f"op {NAMESPACE}::{spec.name} has no form without plugins: {spec.no_portable}: {_WAY_OUT}")
        table[spec.op] = _traced(spec)
    if not table:
        return captured
    with quiet_copies(), torch.no_grad():
        program = captured.program.run_decompositions(table)
    return replace(captured, program=program)


def _traced(spec: OpSpec) -> Callable[..., Any]:
    """The definition as torch's decompositions call it; a reason not to trace it becomes one PlanError."""
    definition = spec.load(spec.portable) if spec.portable else spec.reference

    def decompose(*args: Any, **kwargs: Any) -> Any:
        try:
            with _SinglePrecision():
                return definition(*args, **kwargs)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise PlanError(
                f"op {NAMESPACE}::{spec.name} cannot be lowered to standard operators: {first_line(error)}: {_WAY_OUT}"
            ) from error

    return decompose


class _SinglePrecision(TorchFunctionMode):
    """float32 for float64, and operators that ONNX has for those that it lacks."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.double:
            return args[0].float()
        if kwargs.get("dtype") is torch.float64:
            kwargs["dtype"] = torch.float32
        args = tuple(torch.float32 if a is torch.float64 else a for a in args)
        stand_in = _STAND_INS.get(func)
        return stand_in(*args, **kwargs) if stand_in else func(*args, **kwargs)


def _sort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Any:
    """TopK of everything: ONNX promises the lower index for equal values, which is a stable sort."""
    return torch.return_types.sort(torch.topk(x, x.shape[dim], dim, descending))


def _argsort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = False) -> torch.Tensor:
    return _sort(x, dim, descending)[1]


def _distances(x: torch.Tensor, y: torch.Tensor, p: float = 2.0, compute_mode: str = "") -> torch.Tensor:
    """Euclidean distances by differences, as `donot_use_mm_for_euclid_dist` computes them."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).sqrt()


_STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.sort: _sort,
    torch.Tensor.sort: _sort,
    torch.argsort: _argsort,
    torch.Tensor.argsort: _argsort,
    torch.cdist: _distances,
}
