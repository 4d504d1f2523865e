"""The float32 twin of an ONNX graph in half precision, for machines that have no half arithmetic.

ONNX Runtime has few bfloat16 operators on a CPU, and computes float16 ones in float32 between places of its own choice.
The twin computes every operator in float32 and rounds each result that is half in the graph, once, to that type: what a
kernel that accumulates in float32 does. Weights are taken as they are.
"""

from collections.abc import Callable, Iterator

import numpy
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
_WIDE = "__float32"


def element_types(graph: GraphProto) -> dict[str, int]:
    """The element type of every named value of a graph and of the graphs inside it."""
    types: dict[str, int] = {}
    for inner in graphs_of(graph):
        types |= {t.name: t.data_type for t in inner.initializer}
        for value in (*inner.input, *inner.output, *inner.value_info):
            if value.type.tensor_type.elem_type:
                types[value.name] = value.type.tensor_type.elem_type
    return types


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for inner in bodies(node):
            yield from graphs_of(inner)


def bodies(node: NodeProto) -> list[GraphProto]:
    """The graphs in a node's attributes: the body of a loop, the branches of a condition."""
    return [
        inner
        for attribute in node.attribute
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
        for inner in ([attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs)
    ]


def has_halves(types: dict[str, int]) -> bool:
    """Whether a value is float16 or bfloat16."""
    return not HALVES.isdisjoint(types.values())


def widen(model: ModelProto, types: dict[str, int], keep: Callable[[NodeProto], bool]) -> None:
    """Turn a model into its twin, in place.

    Args:
        model: every value's type is in `types`.
        types: before.
        keep: nodes to leave alone but for the rounding, because others compute them.
    """
    for graph in reversed(list(graphs_of(model.graph))):  # the inner ones first: what is put back below is a copy
        for tensor in graph.initializer:
            if tensor.data_type in HALVES:
                tensor.CopyFrom(numpy_helper.from_array(_wide(tensor), tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            _widen_value(value)
        nodes: list[NodeProto] = []
        for node in graph.node:
            nodes.append(node)
            if keep(node):
                continue
            _widen_attributes(node)
            for index, name in enumerate(node.output):
                if types.get(name) in HALVES:
                    node.output[index] = name + _WIDE
                    rounded = name + _WIDE + "_rounded"
                    nodes.append(helper.make_node("Cast", [name + _WIDE], [rounded], to=types[name]))
                    nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
        del graph.node[:]
        graph.node.extend(nodes)


def _wide(tensor: TensorProto) -> numpy.ndarray:
    return numpy_helper.to_array(tensor).astype(numpy.float32)


def _widen_value(value: ValueInfoProto) -> None:
    if value.type.tensor_type.elem_type in HALVES:
        value.type.tensor_type.elem_type = TensorProto.FLOAT


def _widen_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in HALVES:
            attribute.t.CopyFrom(numpy_helper.from_array(_wide(attribute.t), attribute.t.name))
        if node.op_type in ("Cast", "EyeLike") and attribute.name in ("to", "dtype") and attribute.i in HALVES:
            attribute.i = TensorProto.FLOAT
