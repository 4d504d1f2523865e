"""`--plugins aot`: every op of ours in a model as a kernel inside the plan, or a refusal that names the op."""

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper

from planmill.engine.capture import Captured
from planmill.engine.errors import PlanError
from planmill.engine.plugins.launches import NotOneKernel, trace_launch
from planmill.kernels import OpSpec
from planmill.kernels.common.spec import NAMESPACE, REGISTRY


def check_kernels(captured: Captured) -> None:
    """Say whether every op of ours has the form of one kernel, for the sizes of this model.

    Raises:
        PlanError: one has not; names it, why, and the way out.
    """
    for node in captured.program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != NAMESPACE:
            continue
        spec = REGISTRY[node.target._schema.name.partition("::")[2]]
        dims, dtypes, attributes = _read(spec, node)
        try:
            trace_launch(spec, dims, dtypes, attributes)
        except NotOneKernel as error:
            raise PlanError(f"plugins aot: op {NAMESPACE}::{error}: build with --plugins python or none") from error


def _read(spec: OpSpec, node: torch.fx.Node) -> tuple[list[list[int | None]], list[torch.dtype], dict[str, Any]]:
    """Sizes (None: dynamic) and dtypes of a node's tensors, and its other arguments by name."""
    dims: list[list[int | None]] = []
    dtypes, attributes = [], {}
    for argument, value in zip(spec.parsed.arguments, node.args, strict=False):
        if isinstance(value, torch.fx.Node):
            tensor = value.meta["val"]
            dims.append([size if isinstance(size, int) else None for size in tensor.shape])
            dtypes.append(tensor.dtype)
        else:
            attributes[argument.name] = value
    return dims, dtypes, attributes


def mark_nodes(path: Path) -> Path:
    """A copy of an ONNX file, beside it, whose nodes of our ops ask the parser for a kernel inside the plan."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.domain == NAMESPACE:
            node.attribute.append(helper.make_attribute("aot", 1))
    marked = path.with_name(f"{path.stem}_aot.onnx")
    onnx.save(model, str(marked))
    return marked
