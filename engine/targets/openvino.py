"""OpenVINO: a program -> its intermediate representation, compiled for the CPU at hand when the plan is loaded.

The payload is a zip of the representation's two files and of what it must be loaded with. OpenVINO knows no op of ours.
The number of threads is torch's when the plan is loaded. A bf16 plan computes in bfloat16 where the CPU has units for
it and in float32 elsewhere. On a CPU it computes float64 in float32 and int64 in int32.
"""

import json
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from planmill.engine.capture import Captured, custom_overloads, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.engine.manifest import Manifest
from planmill.engine.targets import Built, Options, Runner

_PAYLOAD = "openvino.zip"
# What zipfile and json raise on a damaged file: offsets beyond its ends, sizes that are not its own, other methods.
_DAMAGE = (OSError, EOFError, RuntimeError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error)
_GRAPH, _WEIGHTS, _SETTINGS = "model.xml", "model.bin", "settings.json"


def compile_program(captured: Captured, folder: Path, options: Options) -> Built:
    """Translate a captured model.

    Args:
        captured: the model.
        folder: an empty directory for the payload.
        options: must be the default ones.

    Returns:
        The payload.

    Raises:
        PlanError: an option of another target; OpenVINO is not installed, or does not know an op or a dtype of the
            model.
    """
    if options != Options():
        raise PlanError("target openvino takes neither plugins nor SM architectures: these are for a GPU")
    openvino = _library()
    if ours := sorted({op._schema.name for op in custom_overloads(captured.program)}):
        raise PlanError(f"target openvino does not know op {ours[0]}: build with target aoti, which calls it")
    for spec in (*captured.inputs, *captured.outputs):
        if spec.torch_dtype in (torch.bfloat16, torch.float16) or spec.torch_dtype.is_complex:
            raise PlanError(f"target openvino: {spec.name} is {spec.dtype}; give the model float32 inputs and outputs")
    try:
        with quiet_copies(), torch.no_grad():
            model = openvino.convert_model(captured.program)
        model.reshape({port: _shape(openvino, captured, index) for index, port in enumerate(model.inputs)})
    except _failures(openvino) as error:
        lines = [line.strip(" -") for line in str(error).splitlines()]
        reason = next((line for line in lines if "No conversion rule" in line), first_line(error))
        raise PlanError(f"target openvino cannot translate the model: {reason}: build with target aoti") from error
    openvino.save_model(model, folder / _GRAPH, compress_to_fp16=False)
    floats = {value.dtype for value in captured.program.state_dict.values() if value.is_floating_point()}
    half = floats == {torch.bfloat16}
    (folder / _SETTINGS).write_text(json.dumps({"precision": "bf16" if half else "f32"}))
    with zipfile.ZipFile(folder / _PAYLOAD, "w", zipfile.ZIP_STORED) as archive:
        for name in (_GRAPH, _WEIGHTS, _SETTINGS):
            archive.write(folder / name, name)
    return Built(folder / _PAYLOAD)


def load_payload(path: Path, manifest: Manifest | None = None) -> Runner:
    """Compile the model for this CPU; the file may be deleted afterwards.

    Raises:
        PlanError: OpenVINO is not installed or cannot load it.
    """
    openvino = _library()
    core = openvino.Core()
    try:
        graph, weights, wanted = _unpacked(path)
        model = core.read_model(graph, weights)
        able = wanted.upper() in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": wanted if able else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return _Runner(openvino, core.compile_model(model, "CPU", config))
    except RuntimeError as error:
        raise PlanError(f"the plan's OpenVINO model cannot be loaded: {first_line(error)}") from error


def _unpacked(path: Path) -> tuple[bytes, bytes, str]:
    """Graph, weights and the precision to compute in."""
    try:
        with zipfile.ZipFile(path) as archive:
            graph, weights, settings = (archive.read(name) for name in (_GRAPH, _WEIGHTS, _SETTINGS))
        wanted = json.loads(settings)["precision"]
        if wanted not in ("f32", "bf16"):
            raise ValueError(f"no precision named {wanted!r}")
    except _DAMAGE as error:
        raise PlanError(f"the plan's OpenVINO model cannot be loaded: {first_line(error)}") from error
    return graph, weights, wanted


class _Runner:
    """A compiled model; every thread that calls it has a request of its own."""

    def __init__(self, openvino: Any, compiled: Any) -> None:
        self._tensor, self._compiled = openvino.Tensor, compiled
        self._own = threading.local()

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        # Copies of the results: the request writes into its own memory again at the next call.
        found = request.infer([self._tensor(x.numpy(), shared_memory=True) for x in inputs], share_outputs=False)
        return [torch.from_numpy(found[port]) for port in self._compiled.outputs]


def _shape(openvino: Any, captured: Captured, index: int) -> Any:
    def size(value: int | str) -> Any:
        if isinstance(value, int):
            return openvino.Dimension(value)
        return openvino.Dimension(captured.dynamic[value].minimum, captured.dynamic[value].maximum)

    return openvino.PartialShape([size(value) for value in captured.inputs[index].shape])


def _failures(openvino: Any) -> tuple[type[Exception], ...]:
    """What OpenVINO raises on a model that it does not take; they have no base of their own."""
    frontend = openvino.frontend
    return (
        RuntimeError,
        frontend.OpConversionFailure,
        frontend.GeneralFailure,
        frontend.NotImplementedFailure,
        frontend.OpValidationFailure,
    )


def _library() -> Any:
    try:
        import openvino
        import openvino.frontend
    except ModuleNotFoundError as error:
        raise PlanError("target openvino needs openvino: pip install 'planmill[openvino]'") from error
    return openvino
