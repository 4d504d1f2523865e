"""From a captured program to an ONNX file; our ops stand in it as nodes of domain `planmill`, or as standard operators.

Opset 20 on purpose: from 23 on scaled dot-product attention is one operator, which TensorRT refuses in float32; as
MatMul, Softmax, MatMul it is fused anyway.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnxscript import opset20

from planmill.engine.capture import Captured, custom_overloads, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.engine.manifest import Plugins
from planmill.engine.onnx_ops import translation
from planmill.engine.onnx_simplify import simplify
from planmill.engine.portable import lower
from planmill.engine.targets import PLUGINS
from planmill.kernels.common.spec import NAMESPACE, REGISTRY

OPSET = 20
_FILE = "model.onnx"
_onnx: Any = opset20  # its signatures do not admit values of a graph
_LARGEST = 1 << 30  # bytes of weights inside the file: a protobuf ends at 2 GiB


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file.

    Args:
        path: the file; weights too large for it lie beside it in `<name>.data`.
        ops: ops of ours that stand in it as nodes, "planmill::name".
        opset: version of the standard operators.
    """

    path: Path
    ops: tuple[str, ...]
    opset: int


def export_onnx(captured: Captured, folder: Path, *, plugins: Plugins, largest: int = _LARGEST) -> OnnxModel:
    """Write a captured model as an ONNX file.

    Args:
        captured: the model.
        folder: where to write.
        plugins: "none" lowers every op of ours to standard operators; with "python" and "aot" they stay nodes.
        largest: bytes of weights above which they go to a file of their own.

    Returns:
        The file and what is in it.

    Raises:
        PlanError: an op that ONNX has no operator for, or one of ours that cannot be lowered; names it.
    """
    if plugins not in PLUGINS:
        raise PlanError(f"plugins must be {', '.join(PLUGINS)}, got {plugins!r}")
    ours = {op: REGISTRY[op._schema.name.partition("::")[2]] for op in own_overloads(captured)}
    if plugins == "none":
        captured, ours = lower(captured, ours.values()), {}
    with _quiet(), torch.no_grad():
        try:
            made = torch.onnx.export(
                captured.program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=_STABLE | {op: translation(spec) for op, spec in ours.items()},
                input_names=[spec.name for spec in captured.inputs],
                output_names=[spec.name for spec in captured.outputs],
                optimize=False,
            )
            assert made is not None
            simplify(made.model)
        except torch.onnx.OnnxExporterError as error:
            raise PlanError(f"the model cannot become ONNX: {_reason(error)}") from error
    _name_dimensions(made.model, captured)
    path = folder / _FILE
    made.save(str(path), external_data=_weight_bytes(captured) > largest)
    return OnnxModel(path, tuple(sorted(f"{NAMESPACE}::{spec.name}" for spec in ours.values())), OPSET)


def _log_sigmoid(x: Any) -> Any:
    """min(x, 0) - log(1 + exp(-|x|)); the exporter of torch 2.13 writes log(sigmoid(x)), -inf from about -90 on."""
    one = _onnx.CastLike(_onnx.Constant(value_float=1.0), x)
    rest = _onnx.Log(_onnx.Add(one, _onnx.Exp(_onnx.Neg(_onnx.Abs(x)))))
    return _onnx.Sub(_onnx.Neg(_onnx.Relu(_onnx.Neg(x))), rest)


_STABLE: dict[Any, Any] = {torch.ops.aten.log_sigmoid.default: _log_sigmoid}


def own_overloads(captured: Captured) -> list[torch._ops.OpOverload]:
    """Ops of ours in a program, in the order of their names."""
    return sorted((op for op in custom_overloads(captured.program) if op.namespace == NAMESPACE), key=str)


def _reason(error: BaseException) -> str:
    """The innermost cause that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _name_dimensions(model: Any, captured: Captured) -> None:
    """Dimensions by the names that the plan gives them, instead of torch's symbols."""
    names = {}
    for spec, value in zip(captured.inputs, model.graph.inputs, strict=True):
        for name, dim in zip(spec.shape, value.shape, strict=True):
            if isinstance(name, str) and not isinstance(dim, int):
                names[str(dim.value)] = name
    if not names:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    values = {*model.graph.inputs, *model.graph.outputs, *(o for node in model.graph for o in node.outputs)}
    for value in values:
        if value.shape is not None:
            for i, dim in enumerate(value.shape):
                if not isinstance(dim, int) and dim.value is not None:
                    value.shape[i] = pattern.sub(lambda match: names[match[0]], str(dim.value))


def _weight_bytes(captured: Captured) -> int:
    tensors = [*captured.program.state_dict.values(), *captured.program.constants.values()]
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress, its warnings and those of the optimiser belong to no user of a plan."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), quiet_copies(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
