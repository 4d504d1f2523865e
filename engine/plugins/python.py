"""IPluginV3 in Python: one class for all ops, for TensorRT-RTX and TensorRT alike.

The builder asks it for shapes, dtypes and formats; a loaded plan calls `enqueue`, which puts tensors over the library's
memory and calls the op, on the stream that it is given. The op's outputs are new tensors, so they are copied once.
"""

import contextlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch

from planmill.engine.plugins.fields import PLUGIN_VERSION, declare_fields, pack_values, read_fields
from planmill.engine.plugins.memory import view_memory
from planmill.engine.plugins.sizes import bind, evaluate, trace_outputs
from planmill.kernels import OpSpec, ops
from planmill.kernels.common.spec import NAMESPACE

# torch's dtype -> TensorRT's name for it.
DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def torch_dtype(type: Any) -> torch.dtype:
    """TensorRT's dtype as torch knows it."""
    return _TORCH[type.name]


_OPERATIONS = {"+": "SUM", "-": "SUB", "*": "PROD", "//": "FLOOR_DIV"}


class OpPlugin:
    """The plugin of one node; the bases of the library in use are mixed in by `plugin_class`.

    Args:
        trt: tensorrt or tensorrt_rtx.
        spec: the op.
        attributes: its scalar arguments by name.
    """

    def __init__(self, trt: Any, spec: OpSpec, attributes: dict[str, Any]) -> None:
        self.trt, self.spec, self.attributes = trt, spec, attributes
        self.plugin_name = spec.name
        self.plugin_namespace = NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.num_outputs = len(spec.parsed.returns)
        self.device = torch.device("cuda")
        self._packed = pack_values(spec, attributes)

    def get_capability_interface(self, type: Any) -> Any:
        return self

    def clone(self) -> Any:
        return make_plugin(self.trt, self.spec, self.attributes)

    def attach_to_context(self, resource_context: Any) -> Any:
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        fields = [self.trt.PluginField(n, b, getattr(self.trt.PluginFieldType, t)) for n, b, t in self._packed]
        return self.trt.PluginFieldCollection(fields)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        # The shape rule needs ranks: sizes play no part in a dtype, and eight dimensions are enough for every tensor.
        outputs = trace_outputs(self.spec, [(None,) * 8] * len(input_types), self._dtypes(input_types), self.attributes)
        return [getattr(self.trt.DataType, DTYPES[dtype]) for _, dtype in outputs]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        dims = [[d.get_constant_value() if d.is_constant() else None for d in shape] for shape in inputs]
        dtypes = [torch.float32] * len(inputs)  # no shape depends on a dtype

        def operate(operation: str, a: Any, b: Any) -> Any:
            kind = getattr(self.trt.DimensionOperation, _OPERATIONS[operation])
            return builder.operation(kind, wrap(a), wrap(b))

        def wrap(size: Any) -> Any:
            return builder.constant(size) if isinstance(size, int) else size

        return [
            self.trt.DimsExprs([wrap(evaluate(size, lambda i, axis: inputs[i][axis], operate)) for size in shape])
            for shape, _ in trace_outputs(self.spec, dims, dtypes, self.attributes)
        ]

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """The op's launcher chooses by the sizes it is called with."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See configure_plugin."""

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        described = in_out[position].desc
        if described.format != self.trt.TensorFormat.LINEAR or described.type.name not in _TORCH:
            return False
        if position < num_inputs:
            return True
        wanted = self.get_output_data_types([d.desc.type for d in in_out[:num_inputs]])
        return described.type == wanted[position - num_inputs]

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        def views(described: Sequence[Any], pointers: Sequence[int]) -> list[torch.Tensor]:
            return [
                view_memory(pointer, tuple(d.dims), _TORCH[d.type.name], self.device)
                for d, pointer in zip(described, pointers, strict=True)
            ]

        on_stream = torch.cuda.stream(torch.cuda.ExternalStream(stream)) if self.device.type == "cuda" else None
        with torch.no_grad(), on_stream or contextlib.nullcontext():
            made = self.spec.op(*bind(self.spec, views(input_desc, inputs), self.attributes))
            made = made if isinstance(made, tuple) else (made,)
            for out, result in zip(views(output_desc, outputs), made, strict=True):
                out.copy_(result)

    @staticmethod
    def _dtypes(types: Sequence[Any]) -> list[torch.dtype]:
        return [_TORCH.get(t.name, torch.float32) for t in types]


class OpCreator:
    """Makes the plugin of an op from a node's fields; the library's base is mixed in by `creator_class`."""

    def __init__(self, trt: Any, spec: OpSpec) -> None:
        self.trt, self.spec = trt, spec
        self.name = spec.name
        self.plugin_namespace = NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.field_names = declare_fields(trt, spec)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        return make_plugin(self.trt, self.spec, read_fields(self.spec, fields))


@cache
def _plugin_class(trt: Any) -> type:
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    def init(self: Any, spec: OpSpec, attributes: dict[str, Any]) -> None:
        for base in bases:  # pybind asks for each
            base.__init__(self)
        OpPlugin.__init__(self, trt, spec, attributes)

    return type("Plugin", (OpPlugin, *bases), {"__init__": init})


@cache
def _creator_class(trt: Any) -> type:
    def init(self: Any, spec: OpSpec) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        OpCreator.__init__(self, trt, spec)

    return type("Creator", (OpCreator, trt.IPluginCreatorV3One), {"__init__": init})


def make_plugin(trt: Any, spec: OpSpec, attributes: dict[str, Any]) -> Any:
    """The plugin of an op with its scalar arguments fixed."""
    return _plugin_class(trt)(spec, attributes)


def make_creator(trt: Any, spec: OpSpec) -> Any:
    """The creator of an op's plugins."""
    return _creator_class(trt)(spec)


_REGISTERED: dict[tuple[str, str], Any] = {}


def register_creators(trt: Any, names: Iterable[str] | None = None) -> list[str]:
    """Enter the creators of the ops named (of all ops) into the library's registry, once; they live as long as we do.

    Returns:
        The names.
    """
    known = ops()
    wanted = sorted(known if names is None else names)
    registry = trt.get_plugin_registry()
    for name in wanted:
        if (trt.__name__, name) not in _REGISTERED:
            creator = make_creator(trt, known[name])
            if not registry.register_creator(creator, NAMESPACE):
                raise RuntimeError(f"TensorRT did not take the plugin {name}: another one has its name")
            _REGISTERED[trt.__name__, name] = creator
    return wanted
