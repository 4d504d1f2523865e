"""Nearest neighbours: segmented maxima, exact kNN, mutual scoring, neighbourhood pooling, re-scoring."""

from typing import TYPE_CHECKING, Any

from planmill.kernels.common.discovery import export_ops

if TYPE_CHECKING:  # the names come from the op folders below, which a type checker does not follow

    def __getattr__(name: str) -> Any: ...


__all__ = export_ops(__name__, globals())
