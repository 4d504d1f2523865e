"""What is computed: one folder per op, below its family. Never imports `tensorrt` or `planmill.engine`."""

if __name__ != "planmill.kernels":
    raise ImportError(
        f"this package is planmill.kernels; it was imported as {__name__!r}, which would register its ops twice"
    )

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from planmill.kernels.common.backends import Choice, which
from planmill.kernels.common.conversions import find_conversion
from planmill.kernels.common.cpu import cpu_capabilities, cpu_capability
from planmill.kernels.common.spec import REGISTRY, Case, OpSpec

if TYPE_CHECKING:  # families are found below, where a type checker does not look

    def __getattr__(name: str) -> Any: ...


__all__ = [
    "REGISTRY",
    "Case",
    "Choice",
    "OpSpec",
    "cpu_capabilities",
    "cpu_capability",
    "families",
    "find_conversion",
    "ops",
    "which",
]


def families() -> list[str]:
    """Names of the op families: every package beside `common` in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg and m.name != "common")


def ops() -> dict[str, OpSpec]:
    """Every op of the library by name. Adding a folder below a family adds an op; no list is kept by hand."""
    return dict(sorted(REGISTRY.items()))


for _family in families():
    importlib.import_module(f"{__name__}.{_family}")
