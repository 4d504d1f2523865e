"""What an op's launcher starts on the GPU, found by running it on tensors whose sizes are symbols.

A kernel inside a plan runs without its launcher: its grid and its integer arguments are expressions over the sizes of
the op's inputs. An op has that form if its launcher starts one kernel, computes nothing beside it, needs no memory but
its outputs, and makes the same choices whatever the sizes are.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import CleanDiv, FloorDiv

from planmill.engine.errors import first_line
from planmill.engine.plugins.sizes import Expression, bind
from planmill.kernels import OpSpec

# What a launcher may do beside its kernel: no work on the GPU.
_FREE = {"empty", "empty_strided", "view", "reshape", "detach", "alias", "slice", "select", "unsqueeze", "sym_size",
         "sym_stride", "sym_numel", "_unsafe_view", "device"}  # fmt: skip
_HINTS = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127)


class NotOneKernel(Exception):
    """The op's launcher is something else than one kernel; the message says what."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Args:
        kernel: the jitted function.
        arguments: by the names of its parameters: a size (int or Expression), another constant, or ("input", i) and
            ("output", i) for the tensors of the op.
        grid: sizes in x, y and z.
        options: num_warps, num_stages.
    """

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[Any, Any, Any]
    options: dict[str, int]


def trace_launch(
    spec: OpSpec, dims: Sequence[Sequence[int | None]], dtypes: Sequence[torch.dtype], attributes: dict[str, Any]
) -> Launch:
    """The launch of an op, for inputs of which some sizes are not known.

    Args:
        spec: the op.
        dims: the sizes of each tensor; None where one is not known.
        dtypes: the dtype of each tensor.
        attributes: the op's other arguments by name.

    Raises:
        NotOneKernel: the launcher does more than start one kernel.
    """
    if not (spec.cuda or "").startswith("_triton"):
        raise NotOneKernel(f"{spec.name} has no Triton kernel")
    launcher = spec.load(str(spec.cuda))
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode, _Work() as work, recorded() as launches:
        hints = iter(_HINTS)
        tensors = [_fake(mode, environment, i, d, t, hints) for i, (d, t) in enumerate(zip(dims, dtypes, strict=True))]
        try:
            made = launcher(*bind(spec, tensors, attributes))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:  # it wants numbers, or a GPU
            raise NotOneKernel(f"{spec.name} cannot be followed on unknown sizes: {first_line(error)}") from error
    outputs = made if isinstance(made, tuple) else (made,)
    if environment.guards:
        raise NotOneKernel(f"{spec.name} chooses by size: {environment.guards[0].expr}")
    if work.done:
        raise NotOneKernel(f"{spec.name} computes beside its kernel: {', '.join(sorted(work.done))}")
    if len(launches) != 1:
        raise NotOneKernel(f"{spec.name} starts {len(launches)} kernels")
    return _describe(spec, tensors, outputs, *launches[0])


class _Work(TorchDispatchMode):
    """Notes what the launcher has torch compute."""

    def __init__(self) -> None:
        super().__init__()
        self.done: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in _FREE:
            self.done.add(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, Any, tuple, dict[str, Any]]]]:
    """Kernel launches as (kernel, grid, arguments, keywords) instead of their running."""
    launches: list[tuple[Any, Any, tuple, dict[str, Any]]] = []
    with intercepted(lambda *launch: launches.append(launch)):
        yield launches


@contextlib.contextmanager
def intercepted(launch: Callable[[Any, Any, tuple, dict[str, Any]], None]) -> Iterator[None]:
    """Call `launch(kernel, grid, arguments, keywords)` where this thread would start a kernel."""
    from triton.runtime.jit import KernelInterface

    original, mine = KernelInterface.__getitem__, threading.get_ident()

    def instead(kernel: Any, grid: Any) -> Callable[..., None]:
        if threading.get_ident() != mine:
            return original(kernel, grid)
        return lambda *args, **kwargs: launch(kernel, grid, args, kwargs)

    KernelInterface.__getitem__ = instead
    try:
        yield
    finally:
        KernelInterface.__getitem__ = original


def _fake(
    mode: FakeTensorMode, environment: ShapeEnv, index: int, dims: Sequence[int | None], dtype: torch.dtype,
    hints: Iterator[int],
) -> torch.Tensor:  # fmt: skip
    sizes = [next(hints) if size is None else size for size in dims]
    kinds = [DimDynamic.STATIC if size is not None else DimDynamic.DYNAMIC for size in dims]
    with contextlib.ExitStack() as outside:
        outside.enter_context(torch.utils._python_dispatch._disable_current_modes())
        real = torch.empty(sizes, dtype=dtype)
    return mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _describe(
    spec: OpSpec, tensors: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], kernel: Any, grid: Any,
    args: tuple, kwargs: dict[str, Any],
) -> Launch:  # fmt: skip
    symbols = {
        size.node.expr: Expression("dim", axis, i)  # type: ignore[attr-defined]
        for i, tensor in enumerate(tensors)
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, torch.SymInt)
    }
    known = {_storage(t): ("input", i) for i, t in enumerate(tensors)} | {
        _storage(t): ("output", i) for i, t in enumerate(outputs)
    }

    def read(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if _storage(value) not in known:
                raise NotOneKernel(f"{spec.name} needs memory of its own")
            if not (isinstance(value.storage_offset(), int) and value.storage_offset() == 0):
                raise NotOneKernel(f"{spec.name} passes a part of a tensor")
            return known[_storage(value)]
        return _size(spec, value.node.expr, symbols) if isinstance(value, torch.SymInt) else value

    names = kernel.arg_names
    options: dict[str, int] = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    arguments = {name: read(value) for name, value in [*zip(names, args, strict=False), *kwargs.items()]}
    sizes = [read(size) for size in grid] + [1, 1]
    return Launch(kernel, {name: arguments[name] for name in names}, (sizes[0], sizes[1], sizes[2]), options)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(spec: OpSpec, expression: Any, symbols: dict[Any, Expression]) -> Any:
    """A sum of products and quotients of sizes, as torch keeps it, in our own form."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if expression in symbols:
        return symbols[expression]
    parts = [_size(spec, part, symbols) for part in expression.args]
    if isinstance(expression, sympy.Add):
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if isinstance(expression, sympy.Mul):
        product = parts[0]
        for part in parts[1:]:
            product = product * part
        return product
    if isinstance(expression, FloorDiv | CleanDiv):
        return parts[0] // parts[1]
    raise NotOneKernel(f"{spec.name} computes a size in a way that a plan cannot: {expression}")
