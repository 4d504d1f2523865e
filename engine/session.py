"""Load a plan and run it."""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

import planmill.kernels  # noqa: F401  a plan may call our ops: importing registers them
from planmill.engine.errors import PlanError
from planmill.engine.manifest import Manifest, TensorSpec
from planmill.engine.plan import Plan
from planmill.engine.targets import Runner, find_target


@dataclass(frozen=True)
class _Check:
    """What an input must satisfy, unpacked from its spec so that a call only compares."""

    spec: TensorSpec
    dtype: torch.dtype
    rank: int
    fixed: tuple[tuple[int, int], ...]
    ranged: tuple[tuple[int, str, int, int], ...]


class Session:
    """A loaded plan.

    Args:
        path: a plan file. It holds native code that loading runs: load only plans you trust.

    Raises:
        PlanError: the file is damaged or foreign, or does not fit this machine, this torch, or the ops at hand.

    Attributes:
        plan: the file and its manifest.
        inputs: name, dtype and shape of each input, in order.
        outputs: the same of each output.

    The number of threads is torch's (`torch.set_num_threads`). A session may be called from several threads; calls wait
    for each other. It computes no gradients.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.plan = Plan.read(path)
        self.plan.check_environment()
        manifest = self.plan.manifest
        self.inputs, self.outputs = tuple(manifest.inputs), tuple(manifest.outputs)
        _check_ops(self.plan)
        target = find_target(manifest.target)
        with tempfile.TemporaryDirectory(prefix="planmill-") as folder:
            self._run: Runner | None = target.load_payload(self.plan.extract(Path(folder)))
        self._checks = [_unpack(spec, manifest) for spec in self.inputs]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the plan.

        Args:
            inputs: tensors on the CPU in the plan's order; strided ones are copied first.

        Returns:
            The output, or a tuple where the plan has several.

        Raises:
            PlanError: an input's number, dtype, rank or size does not fit; says which, what was expected and what came.
        """
        outputs = self._compute(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(
        self, inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run the plan with named inputs and outputs.

        Args:
            inputs: tensors by name, or in the plan's order.

        Returns:
            The outputs by name.

        Raises:
            PlanError: a name is missing or unknown, or an input does not fit.
        """
        if isinstance(inputs, Mapping):
            names = [spec.name for spec in self.inputs]
            if inputs.keys() != set(names):
                raise PlanError(f"the plan takes {', '.join(names)}; got {', '.join(map(str, inputs)) or 'nothing'}")
            ordered: Sequence[torch.Tensor] = [inputs[name] for name in names]
        else:
            ordered = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        outputs = self._compute(ordered)
        return {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Free the native code and the weights; the session cannot be called afterwards."""
        self._run = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compute(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        checks = self._checks
        sizes: dict[str, int] = {}
        if len(inputs) != len(checks):
            names = ", ".join(check.spec.name for check in checks)
            raise PlanError(f"the plan takes {len(checks)} inputs ({names}), got {len(inputs)}")
        ready = []
        for check, x in zip(checks, inputs, strict=True):
            if not isinstance(x, torch.Tensor) or x.dtype is not check.dtype or x.dim() != check.rank or not x.is_cpu:
                _refuse(check.spec, x)
            shape = x.shape
            for dim, size in check.fixed:
                if shape[dim] != size:
                    _refuse(check.spec, x)
            for dim, name, low, high in check.ranged:
                size = shape[dim]
                if not low <= size <= high:
                    _refuse(check.spec, x, f": {name} must be {low} to {high}")
                if sizes.setdefault(name, size) != size:
                    _refuse(check.spec, x, f": {name} is {sizes[name]} on an input before it")
            if x.requires_grad:
                x = x.detach()
            ready.append(x if x.is_contiguous() else x.contiguous())
        run = self._run
        if run is None:
            raise PlanError(f"{self.plan.path}: the session is closed")
        return run(ready)


def _unpack(spec: TensorSpec, manifest: Manifest) -> _Check:
    fixed = tuple((i, size) for i, size in enumerate(spec.shape) if isinstance(size, int))
    ranged = tuple(
        (i, name, manifest.dynamic[name].minimum, manifest.dynamic[name].maximum)
        for i, name in enumerate(spec.shape)
        if isinstance(name, str)
    )
    return _Check(spec, spec.torch_dtype, len(spec.shape), fixed, ranged)


def _refuse(spec: TensorSpec, x: object, why: str = "") -> NoReturn:
    if not isinstance(x, torch.Tensor):
        got = type(x).__name__
    else:
        shape = tuple(x.shape)
        got = f"{str(x.dtype).removeprefix('torch.')} {shape}" + ("" if x.is_cpu else f" on {x.device}")
    raise PlanError(f"input {spec.name}: expected {spec}, got {got}{why}")


def _check_ops(plan: Plan) -> None:
    for op in plan.manifest.ops:
        namespace, _, name = op.partition("::")
        packet, _, overload = name.partition(".")
        with contextlib.suppress(AttributeError):
            getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            continue
        raise PlanError(
            f"{plan.path}: calls the op {op}, which is not registered: import the package that brings it first"
        )
