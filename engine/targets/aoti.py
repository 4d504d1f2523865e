"""AOTInductor: a program -> a package with one shared library, weights inside.

Weights of convolutions and of 16-bit models are frozen: folded into constants, batch norm into its convolution, packed
where a library packs. A float32 model that is mostly linear layers keeps them as they are: packed, they were 1.3 times
slower (benchmarks/NOTES.md). Channels-last is chosen by what the model spends its time on: for a convolutional model
Inductor keeps activations in that layout from the first convolution to the last; for a transformer with one patch
convolution it costs more than it brings.
The number of threads is read when the plan runs (torch.set_num_threads), not when it is built.

For a GPU the program is moved there first, and then our ops become the Triton launches behind them (or what else
`plugins` says), so that the package holds their kernels and runs without Python.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler, OperatorIssue
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from planmill.engine.capture import Captured, custom_overloads, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.engine.graphs import Device, Graph, Graphs
from planmill.engine.manifest import Manifest
from planmill.engine.portable import lower
from planmill.engine.substitution import exact_writes, substitute_launches
from planmill.engine.targets import Built, Options, Runner
from planmill.kernels.common.cpu import extension
from planmill.kernels.common.spec import NAMESPACE, REGISTRY

_PAYLOAD = "aoti.pt2"
# What a compiled plan can pass to a custom op; inside Optional and List too.
_ARGUMENTS = {"Tensor", "int", "SymInt", "float", "bool", "str", "number", "Device"}


def compile_program(captured: Captured, folder: Path, options: Options) -> Built:
    """Compile a captured model.

    Args:
        captured: the model.
        folder: an empty directory for the payload.
        options: the device, and for a GPU what becomes of our ops.

    Returns:
        The payload.

    Raises:
        PlanError: no C++ compiler, an option of another target, or an op that AOTInductor cannot lower.
    """
    if options.sms:
        raise PlanError("target aoti builds for the machine at hand: SM architectures are TensorRT's")
    if options.device == "cpu" and options.plugins != "python":
        raise PlanError(f"plugins {options.plugins}: a plan for the CPU calls our ops; that choice is one of a GPU's")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise PlanError("target aoti needs a C++ compiler: install g++, or name one in CXX") from error
    kernels = None
    if options.device == "cuda":
        captured, kernels = prepare_for_gpu(captured, options, torch.device("cuda", torch.cuda.current_device()))
    _check_schemas(captured)
    path = folder / _PAYLOAD
    try:
        with torch.no_grad(), _stdout_to_stderr(), quiet_copies(), exact_writes() if kernels else nullcontext():
            torch._inductor.aoti_compile_and_package(
                captured.program, package_path=str(path), inductor_configs=_settings(captured, options)
            )
    # NotImplementedError: torch's own word for an op that a device has no kernel for.
    except (OperatorIssue, InductorError, NotImplementedError, CppCompileError) as error:
        raise PlanError(
            f"target aoti cannot lower {_operator(captured, error)}: {first_line(error)}: write that step with other "
            "ops, or wrap it in a custom op whose arguments are tensors, numbers and strings"
        ) from error
    return Built(path, kernels=kernels)


def prepare_for_gpu(captured: Captured, options: Options, device: torch.device) -> tuple[Captured, dict[str, int]]:
    """The model on a GPU, our ops in it as `options.plugins` says.

    Returns:
        The model, and how often it launches each of our kernels.

    Raises:
        PlanError: an op cannot be in the plan in that way.
    """
    captured = replace(captured, program=_moved(captured.program, device))
    if options.plugins == "aot":
        return substitute_launches(captured)
    if options.plugins == "none":
        ours = [op for op in custom_overloads(captured.program) if op.namespace == NAMESPACE]
        captured = lower(captured, [REGISTRY[op._opname] for op in sorted(ours, key=str)])
    return captured, {}


def _moved(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """A copy of the program with its weights and its graph on another device."""
    moved = copy.copy(program)
    moved._graph_module = copy.deepcopy(program.graph_module)
    moved._state_dict, moved._constants = dict(program.state_dict), dict(program.constants)
    return move_to_device_pass(moved, device)


def load_payload(path: Path, manifest: Manifest | None = None) -> Runner:
    """Load a package; it unpacks itself into a temporary directory that goes with the runner.

    Other Python threads run while the package does. Without our extension torch's own loader runs it, and they wait.

    Raises:
        PlanError: torch cannot load it.
    """
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        on_gpu = loader.load_metadata_from_package(str(path), "model").get("AOTI_DEVICE_KEY") == "cuda"
        run = _native(path, single_threaded=on_gpu)
    except RuntimeError as error:
        raise PlanError(f"the plan's native code cannot be loaded: {first_line(error)}") from error
    return GpuRunner(run, Device()) if on_gpu else run


def _native(path: Path, *, single_threaded: bool) -> Runner:
    """The package's code; `single_threaded`: without torch's events between calls, which no CUDA graph takes."""
    module = extension()
    if module is not None:
        return module.AotiRunner(str(path), single_threaded)
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", single_threaded, 1, -1).boxed_run


class GpuRunner:
    """A package for a GPU, loaded; not for several threads at once.

    Args:
        run: the package, called with tensors on the device; takes the list's tensors away.
        device: where it runs.
    """

    def __init__(self, run: Runner, device: Device) -> None:
        self.device, self._payload = device, run
        self._graphs: Graphs | None = None

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run on contiguous inputs; the outputs are where the first input is."""
        home = inputs[0].device
        with self.device.turn():
            outputs = self._graphs(inputs) if self._graphs is not None else self._run(inputs)
            return outputs if home == self.device.device else [x.to(home) for x in outputs]

    def record_graphs(self) -> None:
        """Capture a CUDA graph at the second call with the same input shapes, and replay it from then on."""
        self._graphs = Graphs(self.device, self._run, self._capture)

    def _run(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self._payload([x.to(self.device.device, non_blocking=True) for x in given]))

    def _capture(self, mine: list[torch.Tensor]) -> Graph:
        self._payload(list(mine))  # the first run folds constants and loads kernels, which no graph takes
        outputs: list[torch.Tensor] = []

        def run() -> None:
            outputs[:] = self._payload(list(mine))

        return Graph(mine, outputs, self.device.capture(run))


def _settings(captured: Captured, options: Options) -> dict[str, Any]:
    """Inductor's settings that are not its defaults."""
    last = captured.layout == "channels_last"
    half = any(value.itemsize == 2 and value.is_floating_point() for value in captured.program.state_dict.values())
    settings = {"freezing": last or half or options.device != "cpu", "layout_optimization": last}
    if options.device == "cpu":
        return settings | {"cpp.dynamic_threads": True}
    # Strides are arguments of our kernels, fixed when they were traced: Inductor must not pad rows behind their back.
    # Triton passes a Python float as float32, and kernels are written for that; torch 2.13 would compile for float64.
    return settings | {"comprehensive_padding": False, "_use_fp64_for_unbacked_floats": False}


def _check_schemas(captured: Captured) -> None:
    """A schema that AOTInductor would refuse late, or only when the plan is loaded, is refused here by name."""
    for op in sorted(custom_overloads(captured.program), key=str):
        parts = [(f"argument {a.name}", a.type, _ARGUMENTS) for a in op._schema.arguments]
        parts += [("a result", result.type, {"Tensor"}) for result in op._schema.returns]
        for what, kind, allowed in parts:
            inner = str(kind).removeprefix("Optional[").removeprefix("List[").removeprefix("Optional[").rstrip("]")
            if inner not in allowed:
                raise PlanError(
                    f"target aoti cannot lower op {op}: {what} is of type {kind}, and a plan passes "
                    f"{', '.join(sorted(allowed))}: give the op a schema with these"
                )


def _operator(captured: Captured, error: BaseException) -> str:
    """The op that an error speaks of."""
    text = str(error)
    targets = {str(n.target) for n in captured.program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    named = [name for name in (*captured.ops, *sorted(targets)) if name in text or name.replace("::", ".") in text]
    return f"op {max(named, key=len)}" if named else "the model"


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Compile output belongs to no script that reads standard output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
