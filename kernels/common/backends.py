"""Which backend runs an op on a device, and why a faster one does not."""

import importlib.util
from dataclasses import dataclass

import torch

from planmill.kernels.common import cpu
from planmill.kernels.common.spec import NAMESPACE, REGISTRY, OpSpec


@dataclass(frozen=True)
class Choice:
    """The answer of `which`.

    Attributes:
        op: the op's name.
        device: "cpu" or "cuda".
        backend: "reference", "C++ (<instruction set>)", "numba", "Triton", "CUDA C++" or
            "Triton and CUDA C++".
        missing: one reason per faster backend that will not run, and the sizes that it leaves to the reference; empty
            when the fastest runs.
    """

    op: str
    device: str
    backend: str
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} on {self.device}: {self.backend}" + "".join(f"; {reason}" for reason in self.missing)


def which(op: str, device: str | torch.device = "cpu") -> Choice:
    """Name the backend that runs `op` on `device`, and why a faster one does not.

    Args:
        op: an op's name, e.g. "knn".
        device: "cpu" or "cuda"; an index is accepted and ignored.

    Raises:
        ValueError: no such op, or a device that planmill has no backend for.
    """
    if op not in REGISTRY:
        raise ValueError(f"which: no op named {op!r}; there are {', '.join(sorted(REGISTRY))}")
    spec = REGISTRY[op]
    kind = torch.device(device).type
    if kind == "cpu":
        return _on_cpu(spec)
    if kind == "cuda":
        return _on_cuda(spec)
    raise ValueError(f"which: device must be cpu or cuda, got {kind!r}")


def _on_cpu(spec: OpSpec) -> Choice:
    if spec.cpu is None:
        return Choice(spec.name, "cpu", "reference", (spec.no_kernel or "no CPU kernel: the reference is enough",))
    if spec.cpu != "C++":
        return Choice(spec.name, "cpu", "numba", ())
    module = cpu.extension()
    if module is None:
        return Choice(spec.name, "cpu", "reference", ("the C++ extension was not built: no compiler at install time",))
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{spec.name}", "CPU"):
        return Choice(spec.name, "cpu", "reference", ("the C++ extension is older than this op: install again",))
    level = module.cpu_capability()
    missing = tuple(
        f"no {name}: {module.cpu_capability_reason(index)}" for index, name in enumerate(cpu.LEVELS) if index > level
    )
    return Choice(spec.name, "cpu", f"C++ ({cpu.LEVELS[level]})", missing)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _on_cuda(spec: OpSpec) -> Choice:
    if spec.cuda is None:
        return Choice(spec.name, "cuda", "reference", (spec.no_kernel or "no GPU kernel: the reference is enough",))
    triton = spec.cuda.startswith("_triton")
    backend, needs = ("Triton", ["triton"]) if triton else ("CUDA C++", ["cupy"])
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        return Choice(spec.name, "cuda", "none", (f"no GPU: {why}",))
    if triton and importlib.util.find_spec(f"{spec.package}._cuda") is not None:
        backend, needs = "Triton and CUDA C++", [*needs, "cupy"]
    absent = [f"{name} is not installed (pip install 'planmill[gpu]')" for name in needs if not _installed(name)]
    if absent:
        return Choice(spec.name, "cuda", "none", tuple(absent))
    return Choice(spec.name, "cuda", backend, (f"the reference for {spec.cuda_limit}",) if spec.cuda_limit else ())
