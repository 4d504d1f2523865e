"""A program in which each of our ops is the Triton launches behind it: what is compiled from it holds the kernels.

An op's launcher is traced as it is, with sizes as symbols. What it has torch compute stays torch operators; each launch
becomes one of torch's own nodes for a Triton kernel, functional: it gives new tensors for those that the kernel writes.
A launcher may choose by a size if the choice is the same for every size that the plan takes: every one is tried.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch._export.verifier import SpecViolationError
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

from planmill.engine.capture import Captured, custom_overloads, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.engine.manifest import DimRange
from planmill.engine.plugins.launches import intercepted
from planmill.engine.portable import symbols_of
from planmill.errors import PlanmillError
from planmill.kernels.common import cuda
from planmill.kernels.common.spec import NAMESPACE, REGISTRY, OpSpec

_MOST_SIZES = 4096  # combinations of sizes that a choice is tried for
_WAY_OUT = "build with plugins none, which lowers it to standard operators, or python, which calls it in Python"
# How Python and torch refuse what cannot be done to sizes that are symbols, or to tensors without memory.
_REFUSED = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)


class _NotTraced(Exception):
    """Why the launcher of an op is no part of a program."""


def substitute_launches(captured: Captured) -> tuple[Captured, dict[str, int]]:
    """The same model with the Triton launches of our ops in their place.

    Args:
        captured: the model, on the device that it is compiled for.

    Returns:
        The model, and how often it launches each kernel.

    Raises:
        PlanError: an op has no Triton launcher, or one that cannot be followed on unknown sizes or chooses by them;
            names it and says why.
    """
    choices = _Choices(symbols_of(captured), captured.dynamic)
    ours = [op for op in custom_overloads(captured.program) if op.namespace == NAMESPACE]
    if not ours:
        return captured, {}
    table = {op: _traced(REGISTRY[op._opname], choices) for op in ours}
    try:
        with quiet_copies(), torch.no_grad(), exact_writes():
            program = captured.program.run_decompositions(table)
    except PlanError as error:
        raise PlanError(first_line(error)) from error  # torch appends where in the graph it was
    except SpecViolationError as error:
        names = ", ".join(sorted(f"{NAMESPACE}::{op._opname}" for op in ours))
        raise PlanError(f"one of {names} cannot be inside the plan: {first_line(error)}: {_WAY_OUT}") from error
    for node in launches(program):
        _must_write_apart(node)
    launched = Counter(_kernel(node) for node in launches(program))
    return replace(captured, program=program), dict(sorted(launched.items()))


@contextlib.contextmanager
def exact_writes() -> Iterator[None]:
    """What torch reads from a kernel, read from it with its functions inlined.

    torch 2.13 follows the address of a store back through a call to everything that the function was given: a kernel
    that stores where a helper's result says would seem to write its inputs, and weights would be copied at each call.
    """
    from torch._higher_order_ops import triton_kernel_wrap
    from triton._C.libtriton import ir, passes

    module: Any = triton_kernel_wrap
    original = module.generate_ttir

    def instead(*args: Any) -> Any:
        made, names = original(*args)
        manager = ir.pass_manager(made.context)
        passes.common.add_inliner(manager)
        manager.run(made, "inline")
        return made, names

    module.generate_ttir = instead
    try:
        yield
    finally:
        module.generate_ttir = original


def launches(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """The nodes of a program that launch a Triton kernel."""
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    return [node for node in program.graph.nodes if node.target is wrapper]


def _kernel(node: torch.fx.Node) -> str:
    """The name of the kernel that a node launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kwargs: Any = node.kwargs
    kernel: Any = kernel_side_table.get_kernel(kwargs["kernel_idx"])
    while not hasattr(kernel, "params"):  # warps and stages stand in an autotuner of one choice
        kernel = kernel.fn
    return kernel.__name__


@dataclass(frozen=True)
class _Choices:
    """What the launchers chose by size, against the sizes that the plan takes.

    Args:
        names: torch's symbol of each dynamic dimension -> the dimension's name.
        ranges: by that name.
    """

    names: Mapping[str, str]
    ranges: Mapping[str, DimRange]

    def check(self, choice: Any) -> None:
        """A choice made while the sizes were symbols must be the choice for all sizes of the plan.

        Raises:
            _NotTraced: it is not, or there are too many to try.
        """
        symbols = sorted(choice.free_symbols, key=str)
        if not all(str(symbol) in self.names for symbol in symbols):
            raise _NotTraced(f"its launcher chooses by values ({_short(choice)})")
        dims = [self.names[str(symbol)] for symbol in symbols]
        shown = _short(choice.xreplace({s: sympy.Symbol(name) for s, name in zip(symbols, dims, strict=True)}))
        sizes = [range(self.ranges[name].minimum, self.ranges[name].maximum + 1) for name in dims]
        narrower = f"narrow the range of {' and '.join(dims)}, or fix all sizes (dynamic=None, --static)"
        if math.prod(map(len, sizes)) > _MOST_SIZES:
            raise _NotTraced(f"its launcher chooses by size ({shown}), and there are too many to try: {narrower}")
        for values in itertools.product(*sizes):
            at = dict(zip(symbols, map(sympy.Integer, values), strict=True))
            if choice.xreplace(at) != sympy.true:
                where = ", ".join(f"{name} {value}" for name, value in zip(dims, values, strict=True))
                raise _NotTraced(f"its launcher chooses by size ({shown}; otherwise at {where}): {narrower}")


def _short(choice: Any) -> str:
    text = str(choice)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _traced(spec: OpSpec, choices: _Choices) -> Callable[..., Any]:
    """The launcher as torch's decompositions call it; a reason not to trace it becomes one PlanError."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        try:
            return _follow(spec, choices, args, kwargs)
        except (_NotTraced, PlanmillError) as reason:
            message = str(reason)
        except _REFUSED as error:
            message = f"its launcher cannot be followed on unknown sizes: {type(error).__name__}: {first_line(error)}"
        raise PlanError(f"op {NAMESPACE}::{spec.name} cannot be inside the plan: {message}: {_WAY_OUT}")

    return decompose


def _follow(spec: OpSpec, choices: _Choices, args: tuple, kwargs: dict[str, Any]) -> Any:
    # An op without a GPU kernel of its own runs its reference there, by declaration (OpSpec.no_kernel).
    launcher = spec.load(spec.cuda) if spec.cuda else spec.reference
    given = dict(zip((a.name for a in spec.parsed.arguments), args, strict=False)) | kwargs
    bound = [given.get(a.name, a.default_value) for a in spec.parsed.arguments]
    every: list[Any] = [size for a in bound if isinstance(a, torch.Tensor) for size in a.shape]
    guards: list[Any] = next((size.node.shape_env.guards for size in every if isinstance(size, torch.SymInt)), [])
    known = len(guards)
    with cuda.followed(), intercepted(_launch):
        made = dispatch_functionalize(launcher, FunctionalTensorMode())(*bound)
    for guard in guards[known:]:
        choices.check(guard.expr)
    return made


def _launch(kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """A launch as a node of the graph."""
    torch.library.wrap_triton(kernel)[grid](*args, **kwargs)


def _must_write_apart(node: torch.fx.Node) -> None:
    """As a function a kernel gives a new tensor for each that it writes: one passed to it twice would come out twice.

    Raises:
        PlanError: the kernel writes one tensor under two names.
    """
    kwargs: Any = node.kwargs
    names = kwargs["tensors_to_clone"]
    written = [kwargs["kwargs"][name] for name in names]
    if len(set(written)) < len(written):
        raise PlanError(
            f"kernel {_kernel(node)} cannot be inside a plan: it writes one tensor as {' and '.join(names)}"
        )
