"""AOTInductor: a program -> a package with one shared library, weights inside.

Weights are frozen: folded into constants, batch norm into its convolution, packed where a library packs. Channels-last
is chosen by what the model spends its time on: for a convolutional model Inductor keeps activations in that layout from
the first convolution to the last; for a transformer with one patch convolution it costs more than it brings.
The number of threads is read when the plan runs (torch.set_num_threads), not when it is built.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler, OperatorIssue

from planmill.engine.capture import Captured, custom_overloads, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.engine.manifest import Manifest
from planmill.engine.targets import Built, Options, Runner
from planmill.kernels.common.cpu import extension

_PAYLOAD = "aoti.pt2"
# What a compiled plan can pass to a custom op; inside Optional and List too.
_ARGUMENTS = {"Tensor", "int", "SymInt", "float", "bool", "str", "number", "Device"}


def compile_program(captured: Captured, folder: Path, options: Options) -> Built:
    """Compile a captured model.

    Args:
        captured: the model.
        folder: an empty directory for the payload.
        options: must be the default ones.

    Returns:
        The payload.

    Raises:
        PlanError: no C++ compiler, an option of another target, or an op that AOTInductor cannot lower.
    """
    if options != Options():
        raise PlanError("target aoti takes neither plugins nor SM architectures: these are TensorRT's")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise PlanError("target aoti needs a C++ compiler: install g++, or name one in CXX") from error
    _check_schemas(captured)
    path = folder / _PAYLOAD
    try:
        with torch.no_grad(), _stdout_to_stderr(), quiet_copies():
            torch._inductor.aoti_compile_and_package(
                captured.program, package_path=str(path), inductor_configs=_options(captured)
            )
    except (OperatorIssue, InductorError, NotImplementedError, CppCompileError) as error:
        raise PlanError(
            f"target aoti cannot lower {_operator(captured, error)}: {first_line(error)}: write that step with other "
            "ops, or wrap it in a custom op whose arguments are tensors, numbers and strings"
        ) from error
    return Built(path)


def load_payload(path: Path, manifest: Manifest | None = None) -> Runner:
    """Load a package; it unpacks itself into a temporary directory that goes with the runner.

    Other Python threads run while the package does. Without our extension torch's own loader runs it, and they wait.

    Raises:
        PlanError: torch cannot load it.
    """
    module = extension()
    try:
        if module is not None:
            return module.AotiRunner(str(path))
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).boxed_run
    except RuntimeError as error:
        raise PlanError(f"the plan's native code cannot be loaded: {first_line(error)}") from error


def _options(captured: Captured) -> dict[str, Any]:
    return {
        "freezing": True,
        "layout_optimization": captured.layout == "channels_last",
        "cpp.dynamic_threads": True,
    }


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
