"""OpSpec: the one declaration of an op, from which registration, fake, autograd, tests and plugins follow."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

REGISTRY: dict[str, "OpSpec"] = {}

NAMESPACE = "planmill"

Shapes = list[tuple[Sequence[int], torch.dtype]]


@dataclass(frozen=True)
class Case:
    """One input of an op, shared by tests, benchmarks and plan checks.

    Args:
        id: readable name, unique within the op.
        make: `make(dtype, generator) -> args`, the arguments in schema order, float tensors of `dtype`, on the CPU.
        dtypes: input dtypes that the case is meant for.
        gradient: whether the gradient of the float inputs is compared too.
        compiled: whether the case also runs under opcheck, torch.compile and torch.export.
    """

    id: str
    make: Callable[[torch.dtype, torch.Generator], tuple]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    gradient: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class OpSpec:
    """The declaration of one op.

    Args:
        schema: the signature without namespace; only Tensor, int, float, bool and str; default values allowed.
        outputs: shape rule: the op's arguments to a list of (shape, dtype); only + - * // on dimensions.
        reference: the definition in plain PyTorch, float64 inside; takes the op's arguments, returns its outputs.
        cases: inputs that every backend is tested on.
        tolerances: per input dtype (absolute, relative) against the float64 reference of the same inputs.
        cpu: "C++" (registered by the extension), "module:function" of a numba kernel in the op's folder, or None.
        cuda: "module:function" of the launcher in the op's folder, or None.
        cuda_limit: the sizes for which that launcher runs the reference, because no kernel of it holds them.
        no_kernel: why an op with neither `cpu` nor `cuda` needs none.
        compare: replaces the element-wise comparison, for ops whose right answer is not unique:
            `compare(args, got, want, atol, rtol)` raises AssertionError.
        backward: the op's own gradient, `backward(args, outputs, grads)` -> one gradient or None per argument; without
            it the reference is run again under autograd.
        differentiable: False for ops with index outputs only.
        portable: "module:function" in the op's folder that computes what `reference` does by operators that ONNX has,
            whatever the sizes; needed where the reference itself cannot be traced so (loops over tokens, `nonzero`).
        no_portable: why there is no such form.
    """

    schema: str
    outputs: Callable[..., Shapes]
    reference: Callable[..., Any]
    cases: Callable[[], list[Case]]
    tolerances: dict[torch.dtype, tuple[float, float]] = field(
        default_factory=lambda: {
            torch.float32: (1e-5, 1e-5),
            torch.bfloat16: (2e-3, 2e-3),
            torch.float16: (2e-3, 2e-3),
        }
    )
    cpu: str | None = None
    cuda: str | None = None
    cuda_limit: str = ""
    no_kernel: str = ""
    compare: Callable[..., None] | None = None
    backward: Callable[..., tuple] | None = None
    differentiable: bool = True
    portable: str | None = None
    no_portable: str = ""

    def __post_init__(self) -> None:
        if not (self.cpu or self.cuda or self.no_kernel):
            raise ValueError(f"{self.name}: an op without a kernel says why (no_kernel=)")

    @cached_property
    def name(self) -> str:
        """The op's name, as in `torch.ops.planmill.<name>`."""
        return self.schema.partition("(")[0]

    @cached_property
    def package(self) -> str:
        """The op's folder as a package, e.g. `planmill.kernels.neighbors.knn`."""
        return self.reference.__module__.rpartition(".")[0]

    @cached_property
    def family(self) -> str:
        """The family that the op belongs to, e.g. `neighbors`."""
        return self.package.split(".")[-2]

    @cached_property
    def parsed(self) -> torch.FunctionSchema:
        """The schema as torch parses it."""
        return torch._C.parse_schema(f"{NAMESPACE}::{self.schema}")

    @property
    def op(self) -> torch._ops.OpOverload:
        """The registered op."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def load(self, target: str) -> Callable[..., Any]:
        """Import "module:function" from the op's folder."""
        module, _, function = target.partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), function)
