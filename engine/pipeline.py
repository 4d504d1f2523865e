"""Model in, plan out: capture, compile, verify, write."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import JsonValue

import planmill.kernels  # noqa: F401  the ops that a model may call
from planmill.engine.capture import BATCH, Boundary, Captured, Dynamic, Examples, capture
from planmill.engine.errors import PlanError
from planmill.engine.machine import these_versions, this_machine
from planmill.engine.manifest import (
    FORMAT_VERSION,
    Gpu,
    Manifest,
    Payload,
    Plugins,
    Precision,
    Receipt,
    TensorRT,
    Tolerance,
    Verified,
    shape_profile,
)
from planmill.engine.plan import Plan, check_destination, describe_payload, write_plan
from planmill.engine.rewrites import default_passes
from planmill.engine.rewrites import rewrite as rewrite_program
from planmill.engine.swap import accelerate as swap_blocks
from planmill.engine.targets import Built, Device, Options, Runner, Target, choose_device, find_target
from planmill.engine.verify import TOLERANCES, Sampler, verify
from planmill.kernels.common.spec import NAMESPACE

_OURS = f"{NAMESPACE}::"

Progress = Callable[[str, float], None]


def build(
    model: torch.nn.Module,
    example_inputs: Examples,
    out: str | os.PathLike[str],
    *,
    target: str = "aoti",
    device: Device | None = None,
    precision: Precision = "fp32",
    plugins: Plugins | None = None,
    sms: Sequence[int] = (),
    dynamic: Dynamic = BATCH,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, JsonValue] | None = None,
    tolerance: Tolerance | None = None,
    sample: Sampler | None = None,
    accelerate: bool = False,
    rewrite: bool | Sequence[str] = True,
    progress: Progress = lambda stage, fraction: None,
) -> Plan:
    """Turn a model into a plan file, and prove on the way that the plan computes what the model computes.

    Args:
        model: in eval mode, on the CPU; it is not changed.
        example_inputs: one tensor, tensors in the order of `forward`, or tensors by argument name. Their sizes fix what
            `dynamic` leaves, their values set the range of the random inputs that the plan is verified on.
        out: the file to write, `*.plan`. What stands there is replaced only after the new plan has passed.
        target: "aoti", "openvino", "tensorrt-rtx" or "tensorrt".
        device: "cpu" or "cuda": where the plan runs. Target aoti builds for both, for the CPU unless asked; the others
            build for one of them.
        precision: "fp32", or "bf16" or "fp16": bfloat16 or float16 inside, the model's dtypes at the boundary.
        plugins: for a GPU, how ops of ours stand in the plan: "python": called in Python (the default for TensorRT);
            "aot": their kernels inside it (the default for aoti); "none": each lowered to standard operators.
        sms: for TensorRT, the GPU architectures, e.g. (80, 120); the target's own choice when empty.
        dynamic: a DynamicDim for dimension 0 of every input (the default: 1 to 64), {input: {dimension: DynamicDim}},
            or None: all sizes fixed.
        output_names: instead of the names found: dictionary keys or attribute names, else output, output_0, ...
        metadata: JSON that the plan carries along, e.g. class names.
        tolerance: how far the plan may be from the model; `planmill.engine.TOLERANCES[precision]` when not given.
        sample: `sample(sizes, generator) -> inputs` in place of random ones, for a model that takes only some values.
        accelerate: build from the twin of the model whose known third-party blocks are Planmill's layers (see
            `planmill.engine.accelerate`); the plan is still verified against the model as it was given.
        rewrite: apply the exact rewrites of planmill.engine.rewrites, or those named; the manifest names what fired.
        progress: `progress(stage, fraction)`, called as the stages "capture", "compile", "verify", "write" advance.

    Returns:
        The plan written.

    Raises:
        PlanError: the model, the arguments or the destination do not allow a plan, `accelerate` finds nothing to
            replace, or the receipt is out of tolerance.
    """
    started = time.perf_counter()
    module = find_target(target)
    place = choose_device(target, device)
    path = check_destination(out)
    kept = _plain_json(metadata or {})
    progress("capture", 0.0)
    captured = _capture(model, accelerate, example_inputs, dynamic, precision, output_names)
    captured = rewrite_program(captured, default_passes(target, place) if rewrite is True else rewrite or ())
    proof = _Proof(captured, tolerance or TOLERANCES[precision], sample, progress)
    inside = (target, place) == ("aoti", "cuda")
    options = Options(plugins or ("aot" if inside else "python"), tuple(sms), place, proof.of_onnx)
    with tempfile.TemporaryDirectory(prefix="planmill-") as folder:
        progress("compile", 0.0)
        built = module.compile_program(captured, Path(folder), options)
        receipt = proof.receipt or proof.of_built(module, built)
        progress("write", 0.0)
        tensorrt, gpu = _tensorrt(built, captured, options), _gpu(built, options)
        described, seconds = describe_payload(built.payload), time.perf_counter() - started
        manifest = _manifest(
            model, captured, target, place, precision, described, receipt, seconds, kept, tensorrt, gpu
        )
        plan = write_plan(path, manifest, {described.name: built.payload})
    progress("write", 1.0)
    return plan


def _capture(
    model: torch.nn.Module,
    accelerate: bool,
    example_inputs: Examples,
    dynamic: Dynamic,
    precision: Precision,
    output_names: Sequence[str] | None,
) -> Captured:
    """The program of the model, or of its accelerated twin with the model as the reference."""
    if not accelerate:
        return capture(model, example_inputs, dynamic=dynamic, precision=precision, output_names=output_names)
    twin, replaced = swap_blocks(model)
    if not replaced:
        raise PlanError("accelerate: no block of the model is known; leave it out, or use Planmill's layers by hand")
    captured = capture(twin, example_inputs, dynamic=dynamic, precision=precision, output_names=output_names)
    names = [spec.name for spec in captured.inputs] if isinstance(example_inputs, Mapping) else None
    return replace(captured, reference=Boundary(model, names).eval())


class _Proof:
    """The comparison with the model that makes a plan's receipt.

    Args:
        captured: the model.
        tolerance: how far an output may be off.
        sample: see `build`.
        progress: see `build`.

    Attributes:
        receipt: None before the comparison.
    """

    def __init__(self, captured: Captured, tolerance: Tolerance, sample: Sampler | None, progress: Progress) -> None:
        self.captured, self.tolerance, self.sample, self.progress = captured, tolerance, sample, progress
        self.receipt: Receipt | None = None

    def of_built(self, target: Target, built: Built) -> Receipt:
        """Of the payload, or of the ONNX graph behind one that cannot run here."""
        if built.onnx is not None:
            return self.of_onnx(built.onnx)
        self.progress("verify", 0.0)
        return self._of(target.load_payload(built.payload), "executed", "")

    def of_onnx(self, path: Path) -> Receipt:
        """Of an ONNX file."""
        from planmill.engine.onnx_runner import OnnxRunner

        self.progress("verify", 0.0)
        runner = OnnxRunner(path, self.captured.outputs)
        return self._of(runner, "onnx, not executed on device", runner.proof)

    def _of(self, runner: Runner, verified: Verified, proof: str) -> Receipt:
        self.receipt = verify(
            runner,
            self.captured,
            self.tolerance,
            sample=self.sample,
            verified=verified,
            proof=proof,
            progress=lambda fraction: self.progress("verify", fraction),
        )
        return self.receipt


def _tensorrt(built: Built, captured: Captured, options: Options) -> TensorRT | None:
    if built.tensorrt_version is None:
        return None
    return TensorRT(
        version=built.tensorrt_version,
        sms=list(built.sms),
        plugin_mode=options.plugins,
        plugins=built.plugins,
        layers=built.layers,
        opset=built.opset or 0,
        profile=shape_profile(captured.inputs, captured.dynamic),
        builder_seconds=round(built.builder_seconds or 0.0, 3),
    )


def _gpu(built: Built, options: Options) -> Gpu | None:
    if built.kernels is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return Gpu(name=name, sm=10 * major + minor, plugin_mode=options.plugins, kernels=built.kernels)


def _called(ops: list[str], tensorrt: TensorRT | None, gpu: Gpu | None) -> list[str]:
    """The ops that the plan calls where it runs; lowered ones and kernels inside an AOTInductor plan are not."""
    ours_inside = (tensorrt and tensorrt.plugin_mode == "none") or (gpu and gpu.plugin_mode != "python")
    return [op for op in ops if not (ours_inside and op.startswith(_OURS))]


def _manifest(
    model: torch.nn.Module,
    captured: Captured,
    target: str,
    device: Device,
    precision: Precision,
    payload: Payload,
    receipt: Receipt,
    seconds: float,
    metadata: dict[str, JsonValue],
    tensorrt: TensorRT | None,
    gpu: Gpu | None,
) -> Manifest:
    return Manifest(
        format=FORMAT_VERSION,
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        target=target,
        device=device,
        precision=precision,
        layout=captured.layout,
        inputs=captured.inputs,
        outputs=captured.outputs,
        dynamic=captured.dynamic,
        ops=_called(captured.ops, tensorrt, gpu),
        rewrites=captured.rewrites,
        versions=these_versions(),
        platform=this_machine(),
        payloads=[payload],
        receipt=receipt,
        build_time_s=round(seconds, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        metadata=metadata,
        tensorrt=tensorrt,
        gpu=gpu,
    )


def _plain_json(metadata: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The metadata as it will be read back; what JSON would change or drop is refused."""
    try:
        kept = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"metadata must be plain JSON: {error}") from error
    if kept != dict(metadata):
        raise PlanError("metadata must be plain JSON: keys are strings, and sequences are lists")
    return kept
