"""A plan as a model repository of NVIDIA Triton Inference Server.

A plan of native CPU code runs in the server's Python backend, which needs Planmill in the server's Python. A TensorRT
engine that needs nothing of ours runs in the server's own TensorRT backend. The format is that of `model_config.proto`,
written here as text so that only the tests need protobuf.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planmill.engine import Manifest, Plan, PlanError, TensorSpec
from planmill.engine.batching import find_batch
from planmill.errors import PlanmillError
from planmill.serving.triton_backend import PLAN

DTYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
_MODEL = '''\
"""Written by `planmill export-server`. The server's Python needs Planmill, and the torch that built the plan."""

from planmill.serving.triton_backend import TritonPythonModel  # noqa: F401  the server looks for it here
'''


@dataclass(frozen=True)
class RepositorySettings:
    """What the server is told beyond what the plan says.

    Args:
        instances: copies that run at once.
        threads: of each on the CPU; 0: torch's choice.
        max_delay_us: how long a request waits for others.
        max_queue: requests that may wait; more are refused.
    """

    instances: int = 1
    threads: int = 0
    max_delay_us: int = 1000
    max_queue: int = 256


def write_repository(
    path: Path, out: Path, name: str | None = None, settings: RepositorySettings | None = None
) -> Path:
    """Write `out`/NAME/config.pbtxt and `out`/NAME/1/ with the payload.

    Args:
        path: of the plan; none of its code is run.
        out: the repository; made where it does not exist. What stands in it stays.
        name: of the model; the plan's file name without suffix where not given.
        settings: see there.

    Returns:
        The model's folder.

    Raises:
        PlanmillError: the plan cannot be read or served, the name is no model's name, or the model exists already.
    """
    plan = Plan.read(path)
    name = path.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise PlanmillError(f"{name!r} cannot be a model's name: use letters, digits, dots, dashes; or give --name")
    folder = out / name
    if folder.exists():
        raise PlanmillError(f"{folder}: exists already; remove it or give --name")
    text = config(plan, name, settings or RepositorySettings())
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".planmill-", dir=out) as scratch:
            made = Path(scratch) / name
            version = made / "1"
            version.mkdir(parents=True)
            (made / "config.pbtxt").write_text(text)
            if _is_engine(plan):
                plan.extract(version).rename(version / "model.plan")
            else:
                shutil.copyfile(path, version / PLAN)
                (version / "model.py").write_text(_MODEL)
            os.replace(made, folder)  # a server that polls the repository sees all of it or nothing
    except OSError as error:
        raise PlanmillError(f"{out}: cannot be written: {error.strerror}") from error
    return folder


def config(plan: Plan, name: str, settings: RepositorySettings) -> str:
    """The text of `config.pbtxt`.

    Raises:
        PlanError: a dtype that the server does not have, or batches that do not start at one sample.
    """
    manifest = plan.manifest
    largest, optimum = _batch(plan)
    lines = [f"name: {_quote(name)}"]
    lines.append('platform: "tensorrt_plan"' if _is_engine(plan) else 'backend: "python"')
    lines.append(f"max_batch_size: {largest}")
    for what, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            lines += [f"{what} {{", *_tensor(plan, spec, manifest, batched=bool(largest)), "}"]
    if largest:
        lines.append("dynamic_batching {")
        lines.append(f"  preferred_batch_size: [ {optimum} ]")
        lines.append(f"  max_queue_delay_microseconds: {settings.max_delay_us}")
        lines.append(f"  default_queue_policy {{ timeout_action: REJECT max_queue_size: {settings.max_queue} }}")
        lines.append("}")
    kind = "KIND_GPU" if manifest.target.startswith("tensorrt") else "KIND_CPU"
    lines.append(f"instance_group [ {{ kind: {kind} count: {settings.instances} }} ]")
    if settings.threads and kind == "KIND_CPU":
        lines.append(f'parameters {{ key: "threads" value {{ string_value: "{settings.threads}" }} }}')
    return "\n".join(lines) + "\n"


def _is_engine(plan: Plan) -> bool:
    """Whether the server's own TensorRT backend runs the payload: it is not of TensorRT-RTX, and has no op of ours."""
    return plan.manifest.target == "tensorrt" and not plan.manifest.ops


def _batch(plan: Plan) -> tuple[int, int]:
    """The largest and the best batch; 0, 0 where samples cannot share a call."""
    try:
        name, largest = find_batch(plan)
    except PlanError:
        return 0, 0
    sizes = plan.manifest.dynamic[name]
    if sizes.minimum > 1:
        raise PlanError(
            f"{plan.path}: takes batches from {sizes.minimum}, and a server has to run single samples: build it with "
            f"--batch 1:{sizes.optimum}:{sizes.maximum}"
        )
    return largest, sizes.optimum


def _tensor(plan: Plan, spec: TensorSpec, manifest: Manifest, *, batched: bool) -> Sequence[str]:
    if spec.dtype not in DTYPES:
        raise PlanError(f"{plan.path}: {spec.name} is {spec.dtype}, which Triton Inference Server does not have")
    shape = [size if isinstance(size, int) else -1 for size in spec.shape[1 if batched else 0 :]]
    lines = [f"  name: {_quote(spec.name)}", f"  data_type: {DTYPES[spec.dtype]}"]
    if shape:
        return [*lines, f"  dims: [ {', '.join(map(str, shape))} ]"]
    # A sample that is one number: the server has no dims: [ ], so each sample is [1] outside and reshaped inside.
    return [*lines, "  dims: [ 1 ]", "  reshape { shape: [ ] }"]


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
