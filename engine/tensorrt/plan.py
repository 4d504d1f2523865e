"""From a captured model to a TensorRT plan, for both libraries: ONNX file -> builder's process -> payload."""

from collections.abc import Mapping
from pathlib import Path

import torch

from planmill.engine.capture import Captured
from planmill.engine.errors import PlanError
from planmill.engine.manifest import DimRange, TensorSpec, shape_profile
from planmill.engine.onnx_export import OnnxModel, export_onnx
from planmill.engine.plugins import DTYPES, plugin_name
from planmill.engine.targets import Built, Options
from planmill.engine.tensorrt.builder import Job, Library
from planmill.engine.tensorrt.head import read_head
from planmill.engine.tensorrt.kernels import check_kernels, mark_nodes
from planmill.engine.tensorrt.loops import keep_casts_outside
from planmill.engine.tensorrt.process import Builder, start_builder
from planmill.kernels.common.spec import NAMESPACE

PAYLOAD = "tensorrt.engine"
DEFAULT_SMS = (80, 86, 89, 120)
_TOGETHER = 1 << 30  # bytes of an ONNX file beyond which its builder has the memory for itself


def compile_captured(captured: Captured, folder: Path, options: Options, library: Library) -> Built:
    """Build a plan; the arguments are those of a target's `compile_program`.

    Raises:
        PlanError: the options do not fit the library, the model does not become ONNX, or the builder gives no plan.
    """
    _check_options(options, library)
    check_dtypes(captured)
    if options.plugins == "aot":
        check_kernels(captured)
    with start_builder(folder) as builder:
        model = export_onnx(captured, folder, plugins=options.plugins)
        keep_casts_outside(model.path)
        return build_onnx(builder, model, captured.inputs, captured.dynamic, options, library)


def build_onnx(
    builder: Builder,
    model: OnnxModel,
    inputs: list[TensorSpec],
    dynamic: Mapping[str, DimRange],
    options: Options,
    library: Library,
) -> Built:
    """Build the plan of an ONNX file.

    Args:
        builder: the process that does it.
        model: the file.
        inputs: name and shape of each input.
        dynamic: the range of every dynamic dimension.
        options: architectures and kind of plugins.
        library: whose plan.

    Raises:
        PlanError: the builder gives no plan, or another one than was asked for.
    """
    sms, profile = _architectures(options, library), shape_profile(inputs, dynamic)
    job = Job(
        library=library,
        onnx=str(mark_nodes(model.path) if options.plugins == "aot" else model.path),
        plan=str(builder.folder / PAYLOAD),
        report=str(builder.folder / "report.json"),
        sms=sms,
        profile={
            spec.name: list(profile[spec.name]) for spec in inputs if any(isinstance(size, str) for size in spec.shape)
        },
        plugins=[plugin_name(op) for op in model.ops],
        aot=options.plugins == "aot",
    )
    together = sum(file.stat().st_size for file in model.path.parent.glob(f"{model.path.name}*")) <= _TOGETHER
    builder.start(job)
    if options.meanwhile is not None and together:
        options.meanwhile(model.path)
    report = builder.wait(job)
    payload = Path(job.plan)
    if library == "tensorrt_rtx":
        head = read_head(payload)
        if list(head.sms) != sms:
            raise PlanError(f"the builder was asked for SM {sms} and built for SM {list(head.sms)}")
    missing = sorted(set(job.plugins) - report.plugins.keys())
    if missing:
        raise PlanError(f"the builder dropped the plugin of {', '.join(missing)}: no output depends on it")
    return Built(
        payload=payload,
        onnx=model.path,
        layers=report.layers,
        plugins=report.plugins,
        tensorrt_version=report.version,
        sms=tuple(sms),
        opset=model.opset,
        builder_seconds=report.seconds,
    )


def check_dtypes(captured: Captured) -> None:
    """TensorRT's parser would turn float64 into float32 with a warning; here that is the model's to do.

    Raises:
        PlanError: the model computes with a dtype that TensorRT does not have; names the first op that does.
    """
    for node in captured.program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype not in DTYPES:
            users = [str(user.target) for user in node.users if user.op == "call_function"]
            where = str(node.target) if node.op == "call_function" else (users or [node.name])[0]
            own = where.startswith(f"{NAMESPACE}.")  # what an op of ours is given in float64 it needs so: see its docs
            way_out = "" if own else "cast to float32 or int64 in the model, or "
            raise PlanError(
                f"TensorRT has no {str(value.dtype).removeprefix('torch.')}, which op {where} takes or gives: {way_out}"
                "build with --target aoti"
            )


def _architectures(options: Options, library: Library) -> list[int]:
    if library == "tensorrt":
        return []
    return sorted(set(options.sms or DEFAULT_SMS))


def _check_options(options: Options, library: Library) -> None:
    if library == "tensorrt_rtx" and options.plugins == "aot":
        raise PlanError(
            "plugins aot: TensorRT-RTX has no way in for kernels inside the plan: build with --plugins python or none, "
            "or with --target tensorrt"
        )
    if library == "tensorrt" and options.sms:
        raise PlanError("target tensorrt builds for the GPU of this machine: leave out --sm")
