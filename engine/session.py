"""Load a plan and run it."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from torch.profiler import record_function

import planmill.kernels  # noqa: F401  a plan may call our ops: importing registers them
from planmill.engine.errors import PlanError
from planmill.engine.manifest import Manifest, TensorSpec
from planmill.engine.plan import Plan
from planmill.engine.profiling import Profile, profile_calls
from planmill.engine.targets import OnDevice, Runner, find_target


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
        cuda_graphs: for a plan that runs on a GPU: capture what a call puts there once for each set of input shapes,
            at its second call, and replay it from then on.

    Raises:
        PlanError: the file is damaged or foreign, or does not fit this machine, this torch, or the ops at hand.

    Attributes:
        plan: the file and its manifest.
        inputs: name, dtype and shape of each input, in order.
        outputs: the same of each output.

    The number of threads is torch's (`torch.set_num_threads`). A session may be called from several threads. Calls wait
    for each other, since one already uses every thread that torch has; other Python threads run meanwhile. Callers with
    few samples each gain by sharing calls: see `MicroBatcher`. It computes no gradients.
    """

    def __init__(self, path: str | os.PathLike[str], *, cuda_graphs: bool = False) -> None:
        self.plan = Plan.read(path)
        self.plan.check_environment()
        manifest = self.plan.manifest
        self.inputs, self.outputs = tuple(manifest.inputs), tuple(manifest.outputs)
        _check_ops(self.plan)
        target = find_target(manifest.target)
        with tempfile.TemporaryDirectory(prefix="planmill-") as folder:
            self._run: Runner | None = target.load_payload(self.plan.extract(Path(folder)), manifest)
        self._on_device = isinstance(self._run, OnDevice)
        if cuda_graphs:
            if not isinstance(self._run, OnDevice):
                raise PlanError(f"{self.plan.path}: cuda_graphs: this plan of target {manifest.target} runs on the CPU")
            self._run.record_graphs()
        self._checks = [_unpack(spec, manifest) for spec in self.inputs]
        self._lock = threading.Lock()

    def __call__(
        self, *inputs: torch.Tensor, outputs: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the plan.

        Args:
            inputs: tensors in the plan's order, on the CPU, or on the GPU that the plan runs on; strided ones are
                copied first. The outputs are where the first input is.
            outputs: tensors to fill, as `allocate_outputs` makes them; None: the call makes new ones, which share no
                memory with the inputs or with each other and are the caller's to change.

        Returns:
            The output, or a tuple where the plan has several.

        Raises:
            PlanError: the number, dtype, rank or size of an input or of `outputs` does not fit; says which, what was
                expected and what came.
        """
        results = self._compute(inputs, outputs)
        return results[0] if len(results) == 1 else tuple(results)

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

    def allocate_outputs(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Tensors that later calls with inputs of these sizes may fill: `session(*inputs, outputs=...)`.

        Runs the plan once, whose outputs they are. One set serves one caller at a time.

        Raises:
            PlanError: an input does not fit.
        """
        return self._compute(inputs)

    def check(self, *inputs: torch.Tensor) -> None:
        """Say whether a call with these inputs would be accepted; runs nothing.

        Raises:
            PlanError: an input does not fit.
        """
        self._check(inputs)

    def profile(self, *inputs: torch.Tensor, repeat: int = 20, trace: str | os.PathLike[str] | None = None) -> Profile:
        """Where the time of a call goes: by stage of the session, and by kernel inside the payload.

        Args:
            inputs: as of a call.
            repeat: calls to take the mean of; three more come first, unmeasured.
            trace: where a Chrome trace goes (*.json, for chrome://tracing or ui.perfetto.dev), or None.

        Raises:
            PlanError: an input does not fit, `repeat` is not positive, or the trace cannot be written.
        """
        for _ in range(3):
            self._compute(inputs)

        def call() -> None:
            with record_function("planmill: check inputs"):
                ready = self._check(inputs)
            with record_function("planmill: payload"):
                results = self._launch(ready)
            with record_function("planmill: own outputs"):
                _own(results, ready)

        return profile_calls(call, repeat, trace)

    def close(self) -> None:
        """Free the native code and the weights, after the calls under way; the session cannot be called afterwards."""
        with self._lock:
            self._run = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compute(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        ready = self._check(inputs)
        if outputs is None:
            return _own(self._launch(ready), ready)
        filled = list(outputs)
        _check_outputs(self.outputs, filled, self._on_device)
        return _fill(self.outputs, self._launch(ready), filled)

    def _launch(self, ready: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._lock:
            if self._run is None:
                raise PlanError(f"{self.plan.path}: the session is closed")
            return self._run(ready)

    def _check(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as the payload takes them."""
        checks, on_device = self._checks, self._on_device
        sizes: dict[str, int] = {}
        if len(inputs) != len(checks):
            names = ", ".join(check.spec.name for check in checks)
            raise PlanError(f"the plan takes {len(checks)} inputs ({names}), got {len(inputs)}")
        ready = []
        for check, x in zip(checks, inputs, strict=True):
            if not isinstance(x, torch.Tensor) or x.dtype is not check.dtype or x.dim() != check.rank:
                _refuse(f"input {check.spec.name}", check.spec, x)
            if not (x.is_cpu or (on_device and x.is_cuda)):
                _refuse(f"input {check.spec.name}", check.spec, x)
            shape = x.shape
            for dim, size in check.fixed:
                if shape[dim] != size:
                    _refuse(f"input {check.spec.name}", check.spec, x)
            for dim, name, low, high in check.ranged:
                size = shape[dim]
                if not low <= size <= high:
                    _refuse(f"input {check.spec.name}", check.spec, x, f": {name} must be {low} to {high}")
                if sizes.setdefault(name, size) != size:
                    _refuse(
                        f"input {check.spec.name}", check.spec, x, f": {name} is {sizes[name]} on an input before it"
                    )
            if x.requires_grad:
                x = x.detach()
            ready.append(x if x.is_contiguous() else x.contiguous())
        return ready


def _own(outputs: list[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each output in memory of its own: a model may return its input, or two views of one tensor."""
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    for i, output in enumerate(outputs):
        storage = output.untyped_storage().data_ptr()
        if storage in taken and output.numel():
            outputs[i] = output.clone(memory_format=torch.contiguous_format)
        taken.add(storage)
    return outputs


def _check_outputs(specs: Sequence[TensorSpec], outputs: list[torch.Tensor], on_device: bool) -> None:
    if len(outputs) != len(specs):
        raise PlanError(f"outputs: the plan has {len(specs)} outputs, got {len(outputs)} tensors to fill")
    for spec, x in zip(specs, outputs, strict=True):
        if not isinstance(x, torch.Tensor) or x.dtype is not spec.torch_dtype:
            _refuse(f"output {spec.name}", spec, x)
        if not (x.is_cpu or (on_device and x.is_cuda)):
            _refuse(f"output {spec.name}", spec, x)
        if x.requires_grad:
            _refuse(f"output {spec.name}", spec, x, ": it requires a gradient, and a session computes none")


def _fill(specs: Sequence[TensorSpec], results: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copy the results over; nothing is changed unless every shape fits."""
    for spec, result, x in zip(specs, results, outputs, strict=True):
        if x.shape != result.shape:
            _refuse(f"output {spec.name}", spec, x, f": with these inputs it is {tuple(result.shape)}")
    for result, x in zip(results, outputs, strict=True):
        x.copy_(result)
    return outputs


def _unpack(spec: TensorSpec, manifest: Manifest) -> _Check:
    fixed = tuple((i, size) for i, size in enumerate(spec.shape) if isinstance(size, int))
    ranged = tuple(
        (i, name, manifest.dynamic[name].minimum, manifest.dynamic[name].maximum)
        for i, name in enumerate(spec.shape)
        if isinstance(name, str)
    )
    return _Check(spec, spec.torch_dtype, len(spec.shape), fixed, ranged)


def _refuse(what: str, spec: TensorSpec, x: object, why: str = "") -> NoReturn:
    if not isinstance(x, torch.Tensor):
        got = type(x).__name__
    else:
        shape = tuple(x.shape)
        got = f"{str(x.dtype).removeprefix('torch.')} {shape}" + ("" if x.is_cpu else f" on {x.device}")
    raise PlanError(f"{what}: expected {spec}, got {got}{why}")


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
