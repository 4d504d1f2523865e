"""TensorRT and TensorRT-RTX: a program -> ONNX -> a plan, built in a process of its own. See `engine.tensorrt.plan`."""

from dataclasses import dataclass
from pathlib import Path

from planmill.engine.capture import Captured
from planmill.engine.manifest import Manifest
from planmill.engine.targets import Built, Options, Runner
from planmill.engine.tensorrt.builder import Library
from planmill.engine.tensorrt.plan import compile_captured
from planmill.engine.tensorrt.session import load_engine


@dataclass(frozen=True)
class TensorRTTarget:
    """The target of one of the two libraries."""

    library: Library

    def compile_program(self, captured: Captured, folder: Path, options: Options) -> Built:
        """Compile a captured model.

        Args:
            captured: the model.
            folder: an empty directory for the payload.
            options: architectures, and what becomes of our ops.

        Returns:
            The payload and what is known of it.

        Raises:
            PlanError: the options do not fit, the model does not become ONNX, or the builder gives no plan.
        """
        return compile_captured(captured, folder, options, self.library)

    def load_payload(self, path: Path, manifest: Manifest | None = None) -> Runner:
        """Load a plan on the current CUDA device.

        Args:
            path: the payload.
            manifest: names its inputs and outputs in their order.

        Raises:
            PlanError: there is no GPU, no library, or the plan is not for either.
        """
        return load_engine(path, self.library, manifest)


RTX = TensorRTTarget("tensorrt_rtx")
FULL = TensorRTTarget("tensorrt")
