"""An ONNX file computed on this machine: standard operators by ONNX Runtime, ours by their references.

ONNX Runtime does not know our ops, so the graph is cut at them: what lies between is one session each. A graph in half
precision is computed by its float32 twin.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper
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
        self._types = element_types(model.graph)
        if has_halves(self._types):
            widen(model, self._types, _is_cut)
        with tempfile.TemporaryDirectory(prefix="planmill-") as folder:
            self._graph = _Graph(model, model.graph, self._types, Path(folder))
        self.proof = _proof(own, {kind for kind in self._types.values() if kind in HALVES})

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the graph.

        Raises:
            PlanError: ONNX Runtime fails.
        """
        values = {}
        for name, x in zip(self._inputs, inputs, strict=True):
            values[name] = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        found = self._graph.compute(values)
        return [
            x.to(spec.torch_dtype) if self._types.get(name) in HALVES else x
            for name, x, spec in zip(self._names, found, self._outputs, strict=True)
        ]


class _Graph:
    """A graph, or one inside a node of another, cut at what ONNX Runtime does not know.

    Args:
        model: that it stands in.
        graph: the graph.
        types: of its values before `widen`.
        folder: for files.
    """

    def __init__(self, model: ModelProto, graph: GraphProto, types: dict[str, int], folder: Path) -> None:
        self._types = types
        self._outputs = [value.name for value in graph.output]
        self._inputs = [value.name for value in graph.input]
        stages = _stages(graph)
        known = element_types(model.graph)  # of the twin, where there is one
        self._segments = [_segment(model, graph, stages, stage, known, folder) for stage in stages]
        self._cut = [[node for node in stage if _is_cut(node)] for stage in stages]
        read = {name for nodes in self._cut for node in nodes for name in _reads(node)} | set(self._outputs)
        self._constants = {  # the rest stands in the segments
            tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
            if tensor.name in read
        }
        self._bodies = {
            id(node): [_Graph(model, body, types, folder) for body in bodies(node)]
            for nodes in self._cut
            for node in nodes
        }

    def compute(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The graph's outputs, of its inputs and of what it reads from around it."""
        values = {**values, **self._constants}
        for segment, cut in zip(self._segments, self._cut, strict=True):
            if segment is not None:
                feeds = {name: values[name].detach().numpy() for name in segment.inputs}
                try:
                    found = segment.session.run(segment.outputs, feeds)
                except _FAILURES as error:
                    raise PlanError(f"ONNX Runtime cannot compute the model: {first_line(error)}") from error
                values |= zip(segment.outputs, map(torch.as_tensor, found), strict=True)
            for node in cut:
                made = _COMPUTE.get(node.op_type, _Graph._call)(self, node, values)
                values |= zip(node.output, made, strict=True)
        return [values[name] for name in self._outputs]

    def _call(self, node: NodeProto, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """One op of ours, on inputs of the dtypes that the graph says."""
        spec = REGISTRY[node.op_type]
        tensors = [
            values[name].to(TORCH[self._types[name]]) if self._types.get(name) in HALVES else values[name]
            for name in node.input
        ]
        with torch.no_grad():
            found = spec.reference(*call_arguments(spec, node, tensors))
        made = found if isinstance(found, tuple) else (found,)
        return [x.float() if self._types.get(n) in HALVES else x for n, x in zip(node.output, made, strict=True)]

    def _branch(self, node: NodeProto, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """A branch with an op of ours in it."""
        names = [attribute.name for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
        wanted = "then_branch" if bool(values[node.input[0]]) else "else_branch"
        return self._bodies[id(node)][names.index(wanted)].compute(values)

    def _scan(self, node: NodeProto, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """A loop with an op of ours in its body, along dimension 0."""
        body = self._bodies[id(node)][0]
        walked = next(attribute.i for attribute in node.attribute if attribute.name == "num_scan_inputs")
        given = [values[name] for name in node.input]
        state, xs = given[: len(given) - walked], given[len(given) - walked :]
        steps = []
        for now in zip(*xs, strict=True):
            made = body.compute({**values, **dict(zip(body._inputs, [*state, *now], strict=True))})
            state, step = made[: len(state)], made[len(state) :]
            steps.append(step)
        return [*state, *(torch.stack(ys) for ys in zip(*steps, strict=True))]


_COMPUTE = {"If": _Graph._branch, "Scan": _Graph._scan}


def _is_cut(node: NodeProto) -> bool:
    """Whether a node is an op of ours, or has one inside.

    Raises:
        PlanError: it has one inside and is neither a branch nor a loop along dimension 0.
    """
    if node.domain == NAMESPACE:
        return True
    inner = [
        n.op_type for body in bodies(node) for graph in graphs_of(body) for n in graph.node if n.domain == NAMESPACE
    ]
    if not inner:
        return False
    plain = all(not any(a.ints) for a in node.attribute if a.name.startswith("scan_"))
    if node.op_type not in ("If", "Scan") or not plain:
        raise PlanError(f"op {NAMESPACE}::{inner[0]} stands inside a {node.op_type}: build with --plugins none")
    return True


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
    """The nodes by the number of cuts that they come after; what is cut stands last in its stage."""
    level: dict[str, int] = {}
    stages: list[list[NodeProto]] = []
    for node in graph.node:
        stage = max((level.get(name, 0) for name in _reads(node)), default=0)
        stages.extend([] for _ in range(stage + 1 - len(stages)))
        stages[stage].append(node)
        for name in node.output:
            level[name] = stage + _is_cut(node)
    return stages or [[]]


def _segment(
    model: ModelProto,
    graph: GraphProto,
    stages: list[list[NodeProto]],
    stage: list[NodeProto],
    types: dict[str, int],
    folder: Path,
) -> "_Segment | None":
    nodes = [node for node in stage if not _is_cut(node)]
    if not nodes:
        return None
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in _reads(node)} - made
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    inputs = sorted(read - {tensor.name for tensor in constants})
    wanted = {value.name for value in graph.output}
    for other in stages:
        wanted |= {name for node in other if other is not stage or _is_cut(node) for name in _reads(node)}
    outputs = sorted(made & wanted)
    part_graph = helper.make_graph(
        nodes,
        "segment",
        [helper.make_tensor_value_info(name, types[name], None) for name in inputs],
        [helper.make_tensor_value_info(name, types[name], None) for name in outputs],
        constants,
    )
    part = helper.make_model(
        part_graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
    path = folder / "segment.onnx"
    bytes_at_most = 8 * sum(math.prod(tensor.dims) for tensor in constants)  # beyond 2 GiB a protobuf has no ByteSize
    onnx.save(part, path, save_as_external_data=bytes_at_most > 1 << 30, location=f"{len(outputs)}.data")
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
