"""Linear layers whose weights are prepared for the CPU."""

from typing import TYPE_CHECKING, Any

from planmill.kernels.common.discovery import export_ops

if TYPE_CHECKING:  # the names come from the op folders below, which a type checker does not follow

    def __getattr__(name: str) -> Any: ...


__all__ = export_ops(__name__, globals())
