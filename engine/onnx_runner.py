"""An ONNX file computed on this machine: standard operators by ONNX Runtime, ours by their references.

ONNX Runtime does not know our ops, so the graph is cut at them: what lies between is one session each. A graph in half
precision is computed by its float32 twin.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from planmill.engine.errors import PlanError, first_line
from planmill.engine.manifest import TensorSpec
from planmill.engine.onnx_ops import TORCH, call_arguments, register_schema
from planmill.engine.onnx_twin import HALVES, bodies, element_types, graphs_of, has_halves, widen
from planmill.kernels.common.spec import NAMESPACE, REGISTRY

_FAILURES = (
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NotImplemented,
    failures.RuntimeException,
)


@dataclass(frozen=True)
class _Segment:
    """Standard operators between two cuts."""

    session: onnxruntime.InferenceSession
    inputs: list[str]
    outputs: list[str]


class OnnxRunner:
    """An ONNX file as a function: contiguous inputs in order -> outputs in order.

    Args:
        path: the file.
        outputs: names and dtypes of the model's outputs, in order.

    Raises:
        PlanError: the file is damaged, or ONNX Runtime cannot compute it.

    Attributes:
        proof: what a comparison with this runner proves, in words.
    """

    def __init__(self, path: Path, outputs: list[TensorSpec]) -> None:
        model = read_onnx(path)
        self._outputs = outputs
        self._names = [value.name for value in model.graph.output]
        self._inputs = [value.name for value in model.graph.input]
        own = [node for graph in graphs_of(model.graph) for node in graph.node if node.domain == NAMESPACE]
        if len(own) > sum(node.domain == NAMESPACE for node in model.graph.node):
            raise PlanError(f"op {NAMESPACE}::{own[0].op_type} stands inside a loop or a branch: build without plugins")
        self._types = element_types(model.graph)
        if has_halves(self._types):
            widen(model, self._types, lambda node: node.domain == NAMESPACE)
        read = {name for node in own for name in node.input} | set(self._names)  # the rest stands in the segments
        self._constants = {
            tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            for tensor in model.graph.initializer
            if tensor.name in read
        }
        types = element_types(model.graph)  # after widening
        stages = _stages(model.graph)
        with tempfile.TemporaryDirectory(prefix="planmill-") as folder:
            self._segments = [_segment(model, types, stages, stage, Path(folder)) for stage in stages]
        self._custom = [[node for node in stage if node.domain == NAMESPACE] for stage in stages]
        self.proof = _proof(own, {kind for kind in self._types.values() if kind in HALVES})

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the graph.

        Raises:
            PlanError: ONNX Runtime fails.
        """
        values = dict(self._constants)
        for name, x in zip(self._inputs, inputs, strict=True):
            values[name] = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        for segment, custom in zip(self._segments, self._custom, strict=True):
            if segment is not None:
                feeds = {name: values[name].detach().numpy() for name in segment.inputs}
                try:
                    found = segment.session.run(segment.outputs, feeds)
                except _FAILURES as error:
                    raise PlanError(f"ONNX Runtime cannot compute the model: {first_line(error)}") from error
                values |= zip(segment.outputs, map(torch.as_tensor, found), strict=True)
            for node in custom:
                self._call(node, values)
        return [
            values[name].to(spec.torch_dtype) if self._types.get(name) in HALVES else values[name]
            for name, spec in zip(self._names, self._outputs, strict=True)
        ]

    def _call(self, node: NodeProto, values: dict[str, torch.Tensor]) -> None:
        """One op of ours, on inputs of the dtypes that the graph says."""
        spec = REGISTRY[node.op_type]
        tensors = [
            values[name].to(TORCH[self._types[name]]) if self._types.get(name) in HALVES else values[name]
            for name in node.input
        ]
        with torch.no_grad():
            found = spec.reference(*call_arguments(spec, node, tensors))
        for name, x in zip(node.output, found if isinstance(found, tuple) else (found,), strict=True):
            values[name] = x.float() if self._types.get(name) in HALVES else x


def read_onnx(path: Path) -> ModelProto:
    """Read an ONNX file and check it; every type that can be inferred is in the result.

    Raises:
        PlanError: it is no valid ONNX file, or its weights are not where it says.
    """
    for spec in REGISTRY.values():
        register_schema(spec)
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)  # what is over 2 GiB cannot be copied with its weights
        model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
        onnx.load_external_data_for_model(model, str(path.parent))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError, RuntimeError) as error:
        raise PlanError(f"{path}: no valid ONNX file: {first_line(error)}") from error
    return model


def _reads(node: NodeProto) -> set[str]:
    """What a node reads, the graphs inside it included."""
    names = set(node.input)
    for inner in bodies(node):
        made = {value.name for value in (*inner.input, *inner.initializer)} | {o for n in inner.node for o in n.output}
        names |= {name for n in inner.node for name in _reads(n)} - made
        names |= {value.name for value in inner.output} - made
    return names - {""}


def _stages(graph: GraphProto) -> list[list[NodeProto]]:
    """The nodes by the number of our ops that they come after; ours stand last in their stage."""
    level: dict[str, int] = {}
    stages: list[list[NodeProto]] = []
    for node in graph.node:
        stage = max((level.get(name, 0) for name in _reads(node)), default=0)
        stages.extend([] for _ in range(stage + 1 - len(stages)))
        stages[stage].append(node)
        for name in node.output:
            level[name] = stage + (node.domain == NAMESPACE)
    return stages or [[]]


def _segment(
    model: ModelProto, types: dict[str, int], stages: list[list[NodeProto]], stage: list[NodeProto], folder: Path
) -> "_Segment | None":
    nodes = [node for node in stage if node.domain != NAMESPACE]
    if not nodes:
        return None
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in _reads(node)} - made
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    inputs = sorted(read - {tensor.name for tensor in constants})
    wanted = {value.name for value in model.graph.output}
    for other in stages:
        wanted |= {name for node in other if other is not stage or node.domain == NAMESPACE for name in _reads(node)}
    outputs = sorted(made & wanted)
    graph = helper.make_graph(
        nodes,
        "segment",
        [helper.make_tensor_value_info(name, types[name], None) for name in inputs],
        [helper.make_tensor_value_info(name, types[name], None) for name in outputs],
        constants,
    )
    part = helper.make_model(
        graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
    path = folder / "segment.onnx"
    onnx.save(part, path, save_as_external_data=part.ByteSize() > 1 << 30, location=f"{len(outputs)}.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _FAILURES as error:
        raise PlanError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
    return _Segment(session, inputs, outputs)


def _proof(own: list[NodeProto], halves: set[int]) -> str:
    parts = [f"ONNX graph under ONNX Runtime {onnxruntime.__version__} on the CPU"]
    if own:
        names = ", ".join(sorted({f"{NAMESPACE}::{node.op_type}" for node in own}))
        parts.append(f"{names} by reference in PyTorch, not by plugin")
    if halves:
        kinds = " and ".join(sorted(onnx.TensorProto.DataType.Name(kind).lower() for kind in halves))
        parts.append(f"{kinds} computed in float32 and rounded after every operator")
    return "; ".join(parts)
