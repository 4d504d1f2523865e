"""Targets: what a captured program is compiled to. Each is a module, or an object in one ("module:name"), with
`compile_program` and `load_payload`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch

from planmill.engine.capture import Captured
from planmill.engine.errors import PlanError
from planmill.engine.machine import require_gpu
from planmill.engine.manifest import Manifest, Plugins

Device = Literal["cpu", "cuda"]

TARGETS = {
    "aoti": "planmill.engine.targets.aoti",
    "tensorrt-rtx": "planmill.engine.targets.tensorrt:RTX",
    "tensorrt": "planmill.engine.targets.tensorrt:FULL",
    "openvino": "planmill.engine.targets.openvino",
}

# Where the plans of a target run, if not on the CPU alone; the first is the one where no device is asked for.
DEVICES: dict[str, tuple[Device, ...]] = {
    "aoti": ("cpu", "cuda"),
    "tensorrt-rtx": ("cuda",),
    "tensorrt": ("cuda",),
}

_EXTRA = ("onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx")

PLUGINS: dict[str, Plugins] = {mode: mode for mode in get_args(Plugins)}
Runner = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Options:
    """What a target is asked for beyond the program.

    Args:
        plugins: how ops of ours stand in a plan for a GPU: called in Python, as kernels inside the plan, or not at all
            (each lowered to standard operators).
        sms: the GPU architectures of a TensorRT plan, e.g. (80, 120); empty: the target's own choice.
        device: where the plan runs.
        meanwhile: called with the ONNX file while a builder works on it, where the target has one; what it raises ends
            the build.
    """

    plugins: Plugins = "python"
    sms: tuple[int, ...] = ()
    device: Device = "cpu"
    meanwhile: Callable[[Path], object] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Built:
    """What a target made.

    Args:
        payload: the file.
        onnx: the ONNX file that the payload was built from, where the payload is not run at the build: what is
            verified in its place. None: the payload itself is run.
        layers: what the network consists of: layer kind to how many there are.
        plugins: ops of ours in the payload, each with the version of its plugin.
        tensorrt_version: of the builder.
        sms: GPU architectures that the payload runs on.
        opset: of the ONNX file.
        builder_seconds: how long the builder took.
        kernels: our Triton kernels inside an AOTInductor payload for a GPU, and how often a call launches each; None
            where the payload is another.
    """

    payload: Path
    onnx: Path | None = None
    layers: dict[str, int] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    tensorrt_version: str | None = None
    sms: tuple[int, ...] = ()
    opset: int | None = None
    builder_seconds: float | None = None
    kernels: dict[str, int] | None = None


@runtime_checkable
class OnDevice(Protocol):
    """A runner whose payload runs on a GPU: it takes inputs on either side."""

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run; the outputs are where the first input is."""

    def record_graphs(self) -> None:
        """From now on, capture a CUDA graph for each set of input shapes that comes twice, and replay it."""


class Target(Protocol):
    """What the engine asks of a target."""

    def compile_program(self, captured: Captured, folder: Path, options: Options) -> Built:
        """Compile a captured model to one payload file in `folder`."""

    def load_payload(self, path: Path, manifest: Manifest | None = None) -> Runner:
        """Load a payload: contiguous inputs in order -> outputs in order. The file may be deleted afterwards.

        A target whose payload knows its inputs and outputs by name only asks for the manifest.
        """


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        PlanError: there is none, and the message lists those that exist; or a package that it needs is missing.
    """
    if name not in TARGETS:
        raise PlanError(f"no target named {name!r}; there is {', '.join(TARGETS)}")
    path, _, attribute = TARGETS[name].partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in _EXTRA:
            raise PlanError(f"target {name} needs {error.name}: pip install 'planmill[tensorrt]'") from error
        raise
    return cast(Target, getattr(module, attribute) if attribute else module)


def choose_device(target: str, device: str | None) -> Device:
    """Where a plan of a target runs: on `device`, or where the target's plans run if none is named.

    Raises:
        PlanError: the target has no plans for that device, or builds them only where there is one.
    """
    devices = DEVICES.get(target, ("cpu",))
    if device is None:
        return devices[0]
    chosen = next((known for known in devices if known == device), None)
    if chosen is None:
        raise PlanError(f"target {target} builds plans for {' and '.join(devices)}, got device {device!r}")
    if (target, chosen) == ("aoti", "cuda"):
        require_gpu("target aoti --device cuda needs a GPU to build on: AOTInductor tunes and links kernels for it")
    return chosen
