"""What a plan says about itself: the schema of `manifest.json`."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

FORMAT_VERSION: Literal[1] = 1

Precision = Literal["fp32", "bf16", "fp16"]
Verified = Literal["executed", "onnx, not executed on device"]
Plugins = Literal["python", "aot", "none"]
Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\s\x00-\x1f]+$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorSpec(_Record):
    """One input or output.

    Args:
        name: what `Session.run` calls it.
        dtype: torch's name without the prefix, e.g. "float32".
        shape: a number where the dimension is fixed, else the name of a dynamic dimension or an expression of names.
    """

    name: Name
    dtype: str
    shape: list[Size | Annotated[str, Field(min_length=1, max_length=1024)]]

    @model_validator(mode="after")
    def _is_tensor_dtype(self) -> "TensorSpec":
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"{self.dtype!r} is not a dtype of torch")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))}{',' if len(self.shape) == 1 else ''})"


class DimRange(_Record):
    """The sizes that a dynamic dimension may take: from `minimum` to `maximum`, tuned for `optimum`."""

    minimum: Annotated[int, Field(ge=1, lt=2**31)]
    optimum: Annotated[int, Field(ge=1, lt=2**31)]
    maximum: Annotated[int, Field(ge=1, lt=2**31)]

    @model_validator(mode="after")
    def _is_ordered(self) -> "DimRange":
        if not self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"sizes must satisfy min <= opt <= max, got {self.minimum}:{self.optimum}:{self.maximum}")
        return self


def shape_profile(
    inputs: Sequence[TensorSpec], dynamic: Mapping[str, DimRange]
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Smallest, optimal and largest shape of each input."""

    def shape(spec: TensorSpec, which: str) -> list[int]:
        return [size if isinstance(size, int) else getattr(dynamic[size], which) for size in spec.shape]

    return {s.name: (shape(s, "minimum"), shape(s, "optimum"), shape(s, "maximum")) for s in inputs}


class Versions(_Record):
    """The versions that a plan was built with; None for what was not installed."""

    planmill: str
    torch: str
    triton: str | None
    tensorrt: str | None


class Platform(_Record):
    """The machine that a plan's native code needs: `isa` lists instruction sets as the operating system names them."""

    system: str
    machine: str
    isa: list[str]


class Payload(_Record):
    """One file of native code inside the plan."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    size: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Tolerance(_Record):
    """How far a plan may be from its model.

    Args:
        cosine: least cosine between the plan's output and the model's.
        max_rel: largest absolute difference, divided by the largest absolute value of the model's output.
        mismatched: largest fraction of unequal elements of an integer or boolean output.
    """

    cosine: Annotated[float, Field(ge=-1, le=1)]
    max_rel: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    mismatched: Annotated[float, Field(ge=0, le=1)] = 0.0


class OutputReceipt(_Record):
    """Parity of one output, the worst over all cases."""

    name: Name
    max_abs: float
    max_rel: float
    cosine: float
    mismatched: float


class Receipt(_Record):
    """The proof that came with the build: the plan against the model on fresh random inputs.

    Args:
        cases: the sizes of the dynamic dimensions in each case.
        outputs: parity per output.
        tolerance: what was asked.
        verified: "executed": the payload itself was run; otherwise what it was built from was.
        proof: what was compared with the model, in words.
    """

    cases: list[dict[str, int]]
    outputs: list[OutputReceipt]
    tolerance: Tolerance
    verified: Verified = "executed"
    proof: str = ""


class TensorRT(_Record):
    """What a TensorRT plan says beyond the rest.

    Args:
        version: of the library that built the payload, and the one that it runs on.
        sms: GPU architectures that the payload holds code for, e.g. 89 for compute capability 8.9.
        plugin_mode: how ops of ours stand in the payload.
        plugins: the ops that are plugins in it, each with its plugin's version.
        layers: kinds of layers of the network before TensorRT fused them, and how many of each.
        opset: of the ONNX graph that it was built from.
        profile: minimum, optimum and maximum shape of each input.
        builder_seconds: how long the builder took.
    """

    version: str
    sms: list[Annotated[int, Field(ge=50, lt=1000)]]
    plugin_mode: Plugins
    plugins: dict[str, str]
    layers: dict[str, int]
    opset: int
    profile: dict[str, tuple[list[Size], list[Size], list[Size]]]
    builder_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Gpu(_Record):
    """What an AOTInductor plan for a GPU says beyond the rest.

    Args:
        name: of the GPU that it was built on.
        sm: that GPU's compute capability, e.g. 90 for 9.0: the plan runs on 9.0 and later 9.x.
        plugin_mode: how ops of ours stand in the payload.
        kernels: our Triton kernels inside it, and how often a call launches each.
    """

    name: str
    sm: Annotated[int, Field(ge=50, lt=1000)]
    plugin_mode: Plugins
    kernels: dict[str, int]


class Manifest(_Record):
    """Everything that a plan says about itself; `manifest.json` inside the file."""

    format: Literal[1]
    model: str
    target: str
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Precision
    layout: Literal["channels_last", "contiguous"]
    inputs: Annotated[list[TensorSpec], Field(min_length=1)]
    outputs: Annotated[list[TensorSpec], Field(min_length=1)]
    dynamic: dict[str, DimRange]
    ops: list[str]
    rewrites: list[str] = []
    versions: Versions
    platform: Platform
    payloads: Annotated[list[Payload], Field(min_length=1)]
    receipt: Receipt
    build_time_s: float
    created: str
    metadata: dict[str, JsonValue]
    tensorrt: TensorRT | None = None
    gpu: Gpu | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        for what, specs in (("inputs", self.inputs), ("outputs", self.outputs), ("payloads", self.payloads)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ValueError(f"two {what} share a name")
        unknown = {d for spec in self.inputs for d in spec.shape if isinstance(d, str)} - self.dynamic.keys()
        if unknown:
            raise ValueError(f"no range for the dynamic dimension {min(unknown)!r}")
        if not all(re.fullmatch(r"\w+::[\w.]+", op) for op in self.ops):
            raise ValueError("an op's name is not of the form namespace::name")
        if self.tensorrt is not None and self.target not in ("tensorrt", "tensorrt-rtx"):
            raise ValueError(f"a plan of target {self.target!r} has no TensorRT version")
        return self
