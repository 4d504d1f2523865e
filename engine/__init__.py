"""How a model becomes a plan and a plan runs; the only place that knows TensorRT."""

if __name__ != "planmill.engine":
    raise ImportError(f"this package is planmill.engine; it was imported as {__name__!r}")

from planmill.engine.batching import MicroBatcher, QueueFullError
from planmill.engine.capture import BATCH, Captured, DynamicDim, capture
from planmill.engine.errors import PlanError
from planmill.engine.manifest import Manifest, Receipt, TensorSpec, Tolerance
from planmill.engine.pipeline import build
from planmill.engine.plan import Plan
from planmill.engine.profiling import Profile, ProfileRow
from planmill.engine.session import Session
from planmill.engine.swap import Accelerated, accelerate
from planmill.engine.targets import TARGETS
from planmill.engine.verify import TOLERANCES

__all__ = [
    "BATCH",
    "TARGETS",
    "TOLERANCES",
    "Accelerated",
    "Captured",
    "DynamicDim",
    "Manifest",
    "MicroBatcher",
    "Plan",
    "PlanError",
    "Profile",
    "ProfileRow",
    "QueueFullError",
    "Receipt",
    "Session",
    "TensorSpec",
    "Tolerance",
    "accelerate",
    "build",
    "capture",
]
