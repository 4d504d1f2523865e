"""A step around a fault of TensorRT-RTX 1.7.1.116, whose compiler moves a cast of a loop's input into the loop.

A tensor that is cast and then walked along by a Scan is taken for one slice of it there, and the build ends with
"Mismatched number of elements in reshape op". Adding zero to it before the loop keeps the cast outside; values stay as
they are. A release that builds a Scan over a cast input (test_tensorrt_plans.py holds one) needs none of this.
"""

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def keep_casts_outside(path: Path) -> None:
    """Rewrite an ONNX file so that nothing can be moved into its Scans; one without a Scan stays as it is."""
    model = onnx.load(str(path), load_external_data=False)
    if not any(node.op_type == "Scan" for node in model.graph.node):
        return
    nodes: list[NodeProto] = []
    zeros: set[int] = set()
    for node in model.graph.node:
        if node.op_type == "Scan":
            nodes += _shield(node, zeros)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(helper.make_tensor(_zero(kind), kind, [], [0.0]) for kind in sorted(zeros))
    onnx.save(model, str(path))


def _shield(scan: NodeProto, zeros: set[int]) -> list[NodeProto]:
    """Additions of zero in front of what the Scan walks along."""
    attributes = {attribute.name: attribute for attribute in scan.attribute}
    body, walked = attributes["body"].g, attributes["num_scan_inputs"].i
    added = []
    for index in range(len(scan.input) - walked, len(scan.input)):
        kind = body.input[index].type.tensor_type.elem_type
        if kind in _FLOATS:
            zeros.add(kind)
            shielded = f"{scan.input[index]}_outside_{scan.output[0]}_{index}"
            added.append(helper.make_node("Add", [scan.input[index], _zero(kind)], [shielded]))
            scan.input[index] = shielded
    return added


def _zero(kind: int) -> str:
    return f"planmill_zero_{kind}"
