"""A TensorRT plan, loaded: device buffers from torch, on torch's current stream, replayed as a CUDA graph where asked.

Inputs and outputs go by name, so their order is the plan file's, not the library's. A call on host tensors copies them
to the device and gives host tensors back; a call on device tensors stays there. Nothing is allocated by TensorRT's own
buffers, nothing waits for the device but the copies to the host.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from planmill.engine.errors import PlanError
from planmill.engine.graphs import Device, Graph, Graphs, Shapes
from planmill.engine.manifest import Manifest
from planmill.engine.plugins import register_creators, torch_dtype
from planmill.engine.tensorrt.builder import Library, import_library
from planmill.engine.tensorrt.head import read_head
from planmill.errors import PlanmillError


class _Context:
    """One execution context: the shapes and addresses that it was told, and its runs."""

    def __init__(self, engine: Any, inputs: list[str], outputs: list[tuple[str, torch.dtype]], device: Device) -> None:
        self.context = engine.create_execution_context()
        if self.context is None:
            raise PlanError("TensorRT cannot make an execution context: the GPU's memory may be full")
        self.inputs, self.outputs, self.device = inputs, outputs, device
        self.shapes: Shapes | None = None
        self.made: list[tuple[int, ...]] = []
        self.nothing = torch.empty(1, dtype=torch.uint8, device=device.device)  # the address of what is empty

    def prepare(self, ready: list[torch.Tensor]) -> list[torch.Tensor]:
        """Take these inputs; gives the new outputs that the next run fills."""
        shapes = tuple(tuple(x.shape) for x in ready)
        if shapes != self.shapes:
            self._reshape(shapes)
        outputs = [
            torch.empty(shape, dtype=dtype, device=self.device.device)
            for shape, (_, dtype) in zip(self.made, self.outputs, strict=True)
        ]
        for name, x in zip(self.inputs, ready, strict=True):
            self.context.set_tensor_address(name, self._address(x))
        for (name, _), x in zip(self.outputs, outputs, strict=True):
            self.context.set_tensor_address(name, self._address(x))
        return outputs

    def run(self) -> None:
        """Put the plan on the current stream."""
        if not self.context.execute_async_v3(self.device.stream()):
            raise PlanError("TensorRT could not run the plan: its log on standard error says why")

    def _reshape(self, shapes: Shapes) -> None:
        self.shapes = None  # until the context has taken all of them
        for name, shape in zip(self.inputs, shapes, strict=True):
            if not self.context.set_input_shape(name, shape):
                raise PlanError(f"input {name}: the TensorRT payload does not take {list(shape)}")
        missing = self.context.infer_shapes()
        if missing:
            raise PlanError(f"the TensorRT payload needs more to know its shapes: {', '.join(missing)}")
        self.made = [tuple(self.context.get_tensor_shape(name)) for name, _ in self.outputs]
        self.shapes = shapes

    def _address(self, x: torch.Tensor) -> int:
        return x.data_ptr() if x.numel() else self.nothing.data_ptr()


class EngineRunner:
    """A loaded engine; not for several threads at once.

    Args:
        engine: of tensorrt or tensorrt_rtx.
        inputs: names in the order of a call.
        outputs: names in the order of the result.
        device: where it runs.

    Raises:
        PlanError: the engine does not have these inputs and outputs.
    """

    def __init__(self, engine: Any, inputs: Sequence[str], outputs: Sequence[str], device: Device) -> None:
        found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inside = {name for name in found if engine.get_tensor_mode(name).name == "INPUT"}
        # An input that no output depends on is no input of the engine.
        if not inside <= set(inputs) or set(found) - inside != set(outputs):
            raise PlanError(f"the TensorRT payload has other inputs or outputs than the manifest: {', '.join(found)}")
        self.engine, self.device = engine, device
        self._used = [index for index, name in enumerate(inputs) if name in inside]
        self._inputs = [inputs[index] for index in self._used]
        self._outputs = [(name, torch_dtype(engine.get_tensor_dtype(name))) for name in outputs]
        self._context = self._new_context()
        self._graphs: Graphs | None = None

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run on contiguous inputs; the outputs are where the first input is."""
        given = [inputs[index] for index in self._used]
        home = inputs[0].device
        with self.device.turn():
            outputs = self._graphs(given) if self._graphs is not None else self._run(given)
            return outputs if home == self.device.device else [x.to(home) for x in outputs]

    def record_graphs(self) -> None:
        """Capture a CUDA graph at the second call with the same input shapes, and replay it from then on."""
        self._graphs = Graphs(self.device, self._run, self._capture)

    def _new_context(self) -> _Context:
        return _Context(self.engine, self._inputs, self._outputs, self.device)

    def _run(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        ready = [_aligned(x.to(self.device.device, non_blocking=True)) for x in given]
        outputs = self._context.prepare(ready)
        self._context.run()
        return outputs

    def _capture(self, mine: list[torch.Tensor]) -> Graph:
        """A graph has a context of its own: one that changes its shapes would move the memory under it."""
        context = self._new_context()
        outputs = context.prepare(mine)
        context.run()  # the first run of a shape may compile and allocate, which no graph takes
        return Graph(mine, outputs, self.device.capture(context.run), context)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """TensorRT asks for addresses at multiples of 256 bytes: a part of a larger tensor may begin elsewhere."""
    return x if x.data_ptr() % 256 == 0 else x.clone()


def load_engine(path: Path, library: Library, manifest: Manifest | None) -> EngineRunner:
    """Load a payload on the current CUDA device, with our plugins registered.

    Args:
        path: the payload; it may be deleted afterwards.
        library: whose it is.
        manifest: names its inputs and outputs in their order.

    Raises:
        PlanError: there is no GPU or no library, or the payload is not for them; says what is missing.
    """
    if manifest is None:
        raise PlanError("a TensorRT payload is loaded with the manifest that it came with")
    if library == "tensorrt_rtx":
        head = read_head(path)  # says what is wrong with a file before any library sees it
    if not torch.cuda.is_available():
        raise PlanError(
            "a TensorRT plan runs on an NVIDIA GPU, and torch finds none here: use a machine with one, its driver and "
            "a CUDA build of torch, or build the plan with --target aoti for this CPU"
        )
    if library == "tensorrt_rtx":
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor not in head.sms:
            built = ", ".join(f"SM{sm}" for sm in head.sms)
            raise PlanError(
                f"the plan is for {built} and this GPU is SM{major}{minor}: build it with --sm {major}{minor}"
            )
    try:
        trt = import_library(library)
    except PlanmillError as error:
        raise PlanError(str(error)) from error
    register_creators(trt)
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise PlanError(f"{library} {trt.__version__} does not take the plan: its log on standard error says why")
    inputs, outputs = ([spec.name for spec in specs] for specs in (manifest.inputs, manifest.outputs))
    return EngineRunner(engine, inputs, outputs, Device())
