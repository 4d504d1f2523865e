"""Runs in a process of its own, without Triton's interpreter, under which torch cannot trace a launch:
`python follow_launches.py OP ...` captures a model that calls the op, substitutes its launches and runs the program on
the CPU; kernels are interpreted one by one. Prints one JSON line per op for test_substitution.py.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from planmill import kernels
from planmill.engine import Captured, DynamicDim, PlanError, capture
from planmill.engine.capture import resized
from planmill.engine.plugins.launches import intercepted, recorded
from planmill.engine.substitution import launches, substitute_launches
from planmill.kernels import OpSpec
from planmill.kernels.common import cuda


class NoDriver:
    """What Triton asks of a driver before it compiles; there is no GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Calls(nn.Module):
    """The op on the tensors that come, with the case's other arguments."""

    def __init__(self, spec: OpSpec, args: tuple) -> None:
        super().__init__()
        self.spec, self.args = spec, args

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return self.spec.op(*(next(given) if isinstance(a, torch.Tensor) else a for a in self.args))


def interpret(kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    InterpretedFunction(kernel.fn).run(*args, grid=grid, warmup=False, **kwargs)


def call_in_kernel(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return InterpretedFunction(self.fn)(*args, **kwargs)


def plain(kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A launch as what can be compared and printed."""
    options = {}
    while not isinstance(kernel, JITFunction):  # torch keeps warps and stages in an autotuner of one choice
        options = {k: v for k, v in kernel.configs[0].all_kwargs().items() if v is not None}
        kernel = kernel.fn
    named: dict[str, Any] = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for name in ("num_warps", "num_stages"):
        if name in named:
            options[name] = named.pop(name)
    options = {"num_warps": 4, "num_stages": 3, **{k: v for k, v in options.items() if k != "num_ctas"}}
    shown = {n: [str(v.dtype), *v.shape, *v.stride()] if isinstance(v, torch.Tensor) else v for n, v in named.items()}
    return kernel, [kernel.__name__, list(grid) + [1] * (3 - len(grid)), shown, options], named


@contextmanager
def interpreted() -> Iterator[list[Any]]:
    """Launches are noted and run in the interpreter."""
    seen: list[Any] = []

    def run(*launch: Any) -> None:
        kernel, shown, named = plain(*launch)
        seen.append(shown)
        interpret(kernel, launch[1], (), named)

    original = JITFunction.__call__
    JITFunction.__call__ = call_in_kernel
    try:
        with intercepted(run):
            yield seen
    finally:
        JITFunction.__call__ = original


def captured_at_any_batch(spec: OpSpec, args: tuple) -> Captured:
    """The op with its first dimension dynamic where it can be: of as many tensors that share it as the op takes so."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    size = tensors[0].shape[0]
    batch = {0: DynamicDim("batch", 1, max(size, 2), 16)}
    together = [i for i, t in enumerate(tensors) if t.dim() and t.shape[0] == size]
    for count in range(len(together), 0, -1) if size > 1 else ():
        chosen = together[:count]
        larger = iter(resized(t, {0: size + 1}) if i in chosen else t for i, t in enumerate(tensors))
        try:
            spec.reference(*(next(larger) if isinstance(a, torch.Tensor) else a for a in args))
            return capture(Calls(spec, args).eval(), tensors, dynamic={f"input_{i}": batch for i in chosen})
        except (RuntimeError, IndexError, ValueError):  # of what a size is, the op may say so, or the capture
            continue
    return capture(Calls(spec, args).eval(), tensors, dynamic=None)


def as_tuple(x: Any) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def substitute(spec: OpSpec) -> tuple[dict[str, Any], Callable[[], bool]]:
    """What becomes of the op, and a check of the program that is left."""
    args = next(case for case in spec.cases() if case.compiled).make(torch.float32, torch.Generator().manual_seed(0))
    args = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
    captured = captured_at_any_batch(spec, args)
    facts: dict[str, Any] = {"op": spec.name, "dynamic": bool(captured.dynamic), "refused": ""}
    try:
        made, facts["kernels"] = substitute_launches(captured)
    except PlanError as error:
        return facts | {"refused": str(error)}, lambda: True
    nodes = made.program.graph.nodes
    placeholders = {node for node in nodes if node.op == "placeholder"}
    facts["called"] = [str(node.target) for node in nodes if str(node.target).startswith("planmill")]
    passed: list[Any] = [node.kwargs for node in launches(made.program)]
    facts["written"] = [n for p in passed for n in p["tensors_to_clone"] if p["kwargs"][n] in placeholders]
    return facts, lambda: launches_and_computes_alike(spec, args, made)


def launches_and_computes_alike(spec: OpSpec, args: tuple, made: Captured) -> bool:
    """Whether the program launches what the launcher does, at two sizes; what it computes is compared too."""
    program, launcher, alike = made.program.module(), spec.load(spec.cuda) if spec.cuda else spec.reference, True
    for extra in (0, 1) if made.dynamic else (0,):
        tensors = [
            resized(x, {i: x.shape[i] + extra for i, size in enumerate(inp.shape) if size == "batch"})
            for x, inp in zip(made.examples, made.inputs, strict=True)
        ]
        given = iter(tensors)
        bound = tuple(next(given) if isinstance(a, torch.Tensor) else a for a in args)
        with recorded() as eager, cuda.followed():
            launcher(*bound)
        with interpreted() as seen, torch.no_grad():
            got = as_tuple(program(*tensors))
        alike = alike and seen == [plain(*launch)[1] for launch in eager]
        compare(spec, bound, got, as_tuple(spec.reference(*bound)))
    return alike


def compare(spec: OpSpec, args: tuple, got: tuple, want: tuple) -> None:
    atol, rtol = spec.tolerances[torch.float32]
    if spec.compare is not None:
        spec.compare(args, got, want, atol, rtol)
        return
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol, equal_nan=True)


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    # All are traced before the first is interpreted: the interpreter leaves its marks on the language.
    for facts, check in [substitute(kernels.ops()[name]) for name in sys.argv[1:]]:
        print(json.dumps(facts | {"alike": check()}), flush=True)
