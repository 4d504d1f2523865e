"""The process that builds a TensorRT plan, run as a file: `python -P builder.py`.

A builder that fails may take its process along, so it has one of its own. It reads the path of a job file from standard
input, which lets it import while its parent still writes the ONNX file; it leaves a report beside the plan, and its log
on standard error. It imports torch only for a model that holds our ops: hence no import of the engine here. See
`process.py` for the other side.
"""

import atexit
import ctypes
import importlib
import importlib.util
import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from planmill.errors import PlanmillError

Library = Literal["tensorrt_rtx", "tensorrt"]

INSTALL = {
    "tensorrt_rtx": "pip install 'planmill[tensorrt]'",
    "tensorrt": "install tensorrt (10.9 or later) as NVIDIA's installation guide says; its libraries are not on PyPI",
}
# What TensorRT-RTX 1.7 builds for.
SMS = (75, 80, 86, 89, 120, 121)

_links: list[Path] = []  # the folder through which this process loaded the libraries, if it had to


@dataclass(frozen=True)
class Job:
    """What to build.

    Args:
        library: tensorrt_rtx or tensorrt.
        onnx: the ONNX file.
        plan: the file to write.
        report: the file to write about it.
        sms: GPU architectures; for tensorrt none: it builds for the GPU of this machine.
        profile: smallest, optimal and largest shape of every input with a dynamic dimension.
        plugins: names of our ops in the file.
        aot: put the kernels of these ops into the plan, instead of calls of Python (tensorrt only).
        memory_bytes: address space that the build may take beyond the libraries; None: all there is.
    """

    library: Library
    onnx: str
    plan: str
    report: str
    sms: list[int]
    profile: dict[str, list[list[int]]]
    plugins: list[str]
    aot: bool = False
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """What came of it.

    Args:
        error: why there is no plan, empty where there is one.
        version: of the library.
        layers: kind of layer -> how many the network had before the build.
        plugins: plugin -> its version, of those in the network.
        seconds: what the builder took.
    """

    error: str = ""
    version: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def import_library(name: Library) -> Any:
    """Import tensorrt or tensorrt_rtx, able to use plugins.

    Raises:
        PlanmillError: it is not installed, or cannot be loaded.
    """
    if importlib.util.find_spec(name) is None:
        raise PlanmillError(f"{name} is not installed: {INSTALL[name]}")
    try:
        if name == "tensorrt_rtx":
            _provide_unversioned_names()
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise PlanmillError(f"{name} is installed but cannot be loaded: {error}: {INSTALL[name]}") from error


def _provide_unversioned_names() -> None:
    """Load TensorRT-RTX's libraries from a folder in which they also have the names that they look for.

    tensorrt_rtx 1.7.1.116 ships `libtensorrt_rtx.so.1`, but its ONNX parser opens `libtensorrt_rtx.so` at the first
    plugin and aborts the process when there is none. A library looks in the folder that it was loaded from: so they are
    loaded through links, before the package loads them by their own paths. A release that ships the unversioned name
    makes this unnecessary, and then nothing is done.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return
    home = Path(spec.origin).parent
    if (home / "libtensorrt_rtx.so").exists() or not (home / "libtensorrt_rtx.so.1").exists():
        return
    if "tensorrt_rtx_libs" in sys.modules:
        if not _links:
            raise PlanmillError("tensorrt_rtx was imported first, and its plugins would abort: load the plan before it")
        return
    folder = Path(tempfile.mkdtemp(prefix="planmill-rtx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for library in home.glob("lib*.so.1"):
        (folder / library.name).symlink_to(library)
        (folder / library.name.removesuffix(".1")).symlink_to(library)
    # The main library first: the parser needs it.
    for file in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
        if (folder / file).exists():
            ctypes.CDLL(str(folder / file), ctypes.RTLD_GLOBAL)
    _links.append(folder)


def main() -> None:
    """Build the job whose path comes on standard input."""
    line = sys.stdin.readline().strip()
    if not line:  # the parent gave up
        return
    job = Job(**json.loads(Path(line).read_text()))
    try:
        report = run_job(job)
    except PlanmillError as error:
        report = Report(error=str(error))
    except MemoryError:
        report = Report(error="out of memory")
    Path(job.report).write_text(json.dumps(asdict(report)))


def run_job(job: Job) -> Report:
    """Build a plan.

    Raises:
        PlanmillError: why it cannot be built.
    """
    trt = import_library(job.library)
    if job.plugins:
        _provide_plugins(trt, job)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if job.memory_bytes is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + job.memory_bytes,) * 2)
    network = _parse(trt, builder, logger, job)
    config = builder.create_builder_config()
    _set_targets(trt, config, job)
    if job.profile:
        config.add_optimization_profile(_profile(builder, job))
    layers, plugins = _describe(trt, network)
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise PlanmillError("the builder gave no plan")
    with Path(job.plan).open("wb") as file:
        file.write(plan)
    return Report("", trt.__version__, layers, plugins, round(seconds, 3))


def _provide_plugins(trt: Any, job: Job) -> None:
    """The plugins of the job's ops; imports torch and all ops, so only where there are any."""
    if not job.aot:
        from planmill.engine.plugins import register_creators

        register_creators(trt, job.plugins)
        return
    import torch

    from planmill.engine.plugins.declared import declare_op
    from planmill.kernels import ops

    if not torch.cuda.is_available():
        raise PlanmillError("no GPU is here to build for: torch finds none")
    major, minor = torch.cuda.get_device_capability()
    declarations = importlib.import_module(f"{job.library}.plugin")
    for name in job.plugins:
        declare_op(trt, declarations, ops()[name], 10 * major + minor)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= trt.ILogger.Severity.WARNING.value:
                print(f"[{severity.name[0]}] {' '.join(message.split())}", file=sys.stderr, flush=True)

    return Logger()


def _parse(trt: Any, builder: Any, logger: Any, job: Job) -> Any:
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from 11 on
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise PlanmillError(_parser_message(errors))
    return network


def _parser_message(errors: list[Any]) -> str:
    if not errors:
        return "the ONNX file cannot be parsed"
    try:
        name, operator, reason = errors[0].node_name(), errors[0].node_operator(), errors[0].desc().strip()
    except UnicodeDecodeError:  # a damaged file's names
        return "the ONNX file cannot be parsed: its text is not UTF-8"
    where = f" at node {name} ({operator})" if operator else ""
    return f"the ONNX file cannot be parsed{where}: {reason}"


def _set_targets(trt: Any, config: Any, job: Job) -> None:
    if not job.sms:
        return
    config.num_compute_capabilities = len(job.sms)
    for index, sm in enumerate(job.sms):
        capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
        # It answers False for a target that it cannot build for, and does not raise.
        if capability is None or not config.set_compute_capability(capability, index):
            raise PlanmillError(f"{job.library} {trt.__version__} cannot build for SM{sm}; it can for {_listed(SMS)}")


def _listed(sms: tuple[int, ...]) -> str:
    return ", ".join(f"SM{sm}" for sm in sms)


def _profile(builder: Any, job: Job) -> Any:
    profile = builder.create_optimization_profile()
    for name, (low, opt, high) in job.profile.items():
        try:
            profile.set_shape(name, low, opt, high)
        except (ValueError, RuntimeError) as error:
            raise PlanmillError(
                f"input {name}: no profile {low} to {high}: {str(error).strip().splitlines()[0]}"
            ) from error
    return profile


def _describe(trt: Any, network: Any) -> tuple[dict[str, int], dict[str, str]]:
    layers: dict[str, int] = {}
    plugins: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name.lower()
        layers[kind] = layers.get(kind, 0) + 1
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer  # the binding gives every layer its base class
            plugins[layer.plugin.plugin_name] = layer.plugin.plugin_version
    return dict(sorted(layers.items())), dict(sorted(plugins.items()))


if __name__ == "__main__":
    main()
