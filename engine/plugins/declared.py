"""Ops declared to `tensorrt.plugin`, with their kernel inside the plan: no Python when it runs.

Full TensorRT only (10.9 and later): TensorRT-RTX has no such module. An op has this form if its launcher is one kernel:
see `launches` and `ptx`. Floats and strings of a node are folded into its kernel; sizes are passed as 32-bit integers.
"""

import inspect
from typing import Any

from planmill.engine.plugins.launches import trace_launch
from planmill.engine.plugins.ptx import compile_launch
from planmill.engine.plugins.python import DTYPES, torch_dtype
from planmill.engine.plugins.sizes import evaluate, tensor_arguments, trace_outputs
from planmill.kernels import OpSpec
from planmill.kernels.common.spec import NAMESPACE

_KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


def declare_op(trt: Any, plugin: Any, spec: OpSpec, sm: int) -> None:
    """Declare an op: what its outputs are, and its kernel.

    Args:
        trt: tensorrt.
        plugin: tensorrt.plugin.
        spec: the op; `trace_launch` must take it for the sizes of the node.
        sm: the architecture that the plan is built for.
    """
    names = tensor_arguments(spec)
    scalars = [a.name for a in spec.parsed.arguments if str(a.type) != "Tensor"]

    def describe(*args: Any, **attributes: Any) -> Any:
        tensors, values = args[: len(names)], dict(zip(scalars, args[len(names) :], strict=False)) | attributes
        ranks = [[None] * len(t.shape_expr) for t in tensors]
        traced = trace_outputs(spec, ranks, [torch_dtype(t.dtype) for t in tensors], values)
        made = tuple(
            plugin.from_shape_expr(
                tuple(_express(plugin.ShapeExpr, tensors, size) for size in shape),
                dtype=getattr(trt.DataType, DTYPES[dtype]),
            )
            for shape, dtype in traced
        )
        return made if len(made) > 1 else made[0]

    def implement(*args: Any) -> Any:
        *args_, outputs, _tactic = args
        tensors, values = args_[: len(names)], dict(zip(scalars, args_[len(names) :], strict=True))
        dims = [[None if size < 0 else size for size in t.shape] for t in tensors]
        inputs = [torch_dtype(t.dtype) for t in tensors]
        launch = trace_launch(spec, dims, inputs, values)
        kernel = compile_launch(launch, inputs, [torch_dtype(t.dtype) for t in outputs], sm)
        parameters = plugin.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y, parameters.grid_z = (
            _express(plugin.SymInt32, tensors, size) for size in kernel.grid
        )
        parameters.block_x, parameters.shared_mem = kernel.threads, kernel.shared
        extra = plugin.SymIntExprs(len(kernel.sizes))
        for index, size in enumerate(kernel.sizes):
            extra[index] = _express(plugin.SymInt32, tensors, size)
        return kernel.name, kernel.ptx, parameters, extra

    tensor = [_parameter(name, plugin.TensorDesc) for name in names]
    scalar = [_parameter(a.name, _KINDS[str(a.type)]) for a in spec.parsed.arguments if a.name in scalars]
    count = len(spec.parsed.returns)
    result: Any = plugin.TensorDesc
    if count > 1:
        result = tuple.__class_getitem__((plugin.TensorDesc,) * count)
    _sign(describe, [*tensor, *scalar], result)
    launched = tuple.__class_getitem__((str, str, plugin.KernelLaunchParams, plugin.SymExprs))
    _sign(implement, [*tensor, *scalar, _parameter("outputs"), _parameter("tactic")], launched)
    name = f"{NAMESPACE}::{spec.name}"
    plugin.register(name)(describe)
    plugin.aot_impl(name)(implement)


def _express(kind: Any, tensors: Any, size: Any) -> Any:
    """A size as an expression of the library, which computes with an expression on the left only."""

    def operate(operation: str, a: Any, b: Any) -> Any:
        a = kind(a) if isinstance(a, int) else a
        return {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "//": a.__floordiv__}[operation](b)

    made = evaluate(size, lambda i, axis: tensors[i].shape_expr[axis], operate)
    return kind(made)


def _parameter(name: str, annotation: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _sign(function: Any, parameters: list[inspect.Parameter], result: Any = inspect.Signature.empty) -> None:
    """The signature that the library reads the declaration from."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)
