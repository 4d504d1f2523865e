"""Our ops in ONNX: schema and translation, both derived from the OpSpec. Domain `planmill`, one node per call.

Tensors are the node's inputs, in the order of the op's schema; int, float, bool and str its attributes, by their names.
An attribute of ONNX holds a float32: `shortest_float` gives back what was meant.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset

from planmill.engine.errors import PlanError
from planmill.engine.plugins.fields import shortest_float
from planmill.kernels.common.spec import NAMESPACE, OpSpec

DOMAIN_VERSION = 1
ELEMENTS: dict[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
}
TORCH = {element: dtype for dtype, element in ELEMENTS.items()}
_TENSORS = [f"tensor({onnx.TensorProto.DataType.Name(element).lower()})" for element in ELEMENTS.values()]
_KINDS = {
    "int": OpSchema.AttrType.INT,
    "float": OpSchema.AttrType.FLOAT,
    "bool": OpSchema.AttrType.INT,
    "str": OpSchema.AttrType.STRING,
}
_LARGEST, _SMALLEST = float(numpy.finfo(numpy.float32).max), float(numpy.finfo(numpy.float32).smallest_subnormal)
_FREE = (960, 1920)  # two sizes to stand for an unknown one: what differs between them depends on it


def encode(op: str, name: str, kind: str, value: Any) -> int | float | str:
    """An argument as an attribute.

    Raises:
        PlanError: a number that a float32 cannot hold.
    """
    if kind == "float":
        if math.isfinite(value) and (abs(value) > _LARGEST or 0 < abs(value) < _SMALLEST):
            raise PlanError(
                f"op {NAMESPACE}::{op}: {name} must fit a float32, which an attribute of ONNX is, got {value}"
            )
        return float(value)
    return str(value) if kind == "str" else int(value)


def decode(kind: str, attribute: onnx.AttributeProto) -> int | float | bool | str:
    """An attribute as the argument that it was made from."""
    value = onnx.helper.get_attribute_value(attribute)
    if kind == "float":
        return shortest_float(value)
    if kind == "str":
        return value.decode()
    return bool(value) if kind == "bool" else int(value)


def call_arguments(spec: OpSpec, node: onnx.NodeProto, tensors: Sequence[torch.Tensor]) -> list[Any]:
    """The op's arguments, in schema order, of a node and its inputs."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    given = iter(tensors)
    kinds = [(argument.name, str(argument.type)) for argument in spec.parsed.arguments]
    return [next(given) if kind == "Tensor" else decode(kind, attributes[name]) for name, kind in kinds]


def schema_of(spec: OpSpec) -> OpSchema:
    """The ONNX schema of an op: a type variable for each tensor, types of the results from the shape rule."""
    tensors = [a.name for a in spec.parsed.arguments if str(a.type) == "Tensor"]
    count = len(spec.parsed.returns)
    schema = OpSchema(
        spec.name,
        NAMESPACE,
        DOMAIN_VERSION,
        doc=(spec.reference.__doc__ or "").strip(),
        inputs=[OpSchema.FormalParameter(name, f"T{i}") for i, name in enumerate(tensors)],
        outputs=[OpSchema.FormalParameter(f"output_{i}", f"U{i}") for i in range(count)],
        type_constraints=[
            *((f"T{i}", _TENSORS, "") for i in range(len(tensors))),
            *((f"U{i}", _TENSORS, "") for i in range(count)),
        ],
        attributes=[
            OpSchema.Attribute(a.name, _KINDS[str(a.type)], required=True)
            for a in spec.parsed.arguments
            if str(a.type) != "Tensor"
        ],
    )
    schema.set_type_and_shape_inference_function(_inference(spec))
    return schema


def register_schema(spec: OpSpec) -> None:
    """Make ONNX know the op; once per process."""
    if not onnx.defs.has(spec.name, DOMAIN_VERSION, NAMESPACE):
        onnx.defs.register_schema(schema_of(spec))


def translation(spec: OpSpec) -> Callable[..., Any]:
    """What torch's exporter calls for a node of the op: it emits the ONNX node."""
    register_schema(spec)
    opset = Opset(NAMESPACE, DOMAIN_VERSION)

    def translate(*args: Any, **kwargs: Any) -> Any:
        tensors, attributes = [], {}
        for index, argument in enumerate(spec.parsed.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
            if str(argument.type) == "Tensor":
                tensors.append(value)
            else:
                attributes[argument.name] = encode(spec.name, argument.name, str(argument.type), value)
        return getattr(opset, spec.name)(*tensors, **attributes)

    return translate


def _inference(spec: OpSpec) -> Callable[[Any], None]:
    """Types and shapes of a node's results, by the op's own shape rule on stand-ins of its inputs."""
    arguments = [(a.name, str(a.type)) for a in spec.parsed.arguments]
    tensors = [name for name, kind in arguments if kind == "Tensor"]

    def infer(context: Any) -> None:
        types = {name: context.get_input_type(i).tensor_type for i, name in enumerate(tensors)}
        if not all(t.elem_type in TORCH and t.HasField("shape") for t in types.values()):
            return
        found = []
        for free in _FREE:
            values = [
                torch.empty(
                    [d.dim_value if d.HasField("dim_value") else free for d in types[name].shape.dim],
                    dtype=TORCH[types[name].elem_type],
                    device="meta",
                )
                if kind == "Tensor"
                else decode(kind, context.get_attribute(name))
                for name, kind in arguments
            ]
            found.append(spec.outputs(*values))
        for index, ((low, dtype), (high, _)) in enumerate(zip(*found, strict=True)):
            sizes = [a if a == b else None for a, b in zip(low, high, strict=True)]
            context.set_output_type(index, onnx.helper.make_tensor_type_proto(ELEMENTS[dtype], sizes))

    return infer
