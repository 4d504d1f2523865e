"""Attention over all tokens and without the softmax, and local and streaming forms of it."""

from typing import TYPE_CHECKING, Any

from planmill.kernels.common.discovery import export_ops

if TYPE_CHECKING:  # the names come from the op folders below, which a type checker does not follow

    def __getattr__(name: str) -> Any: ...


__all__ = export_ops(__name__, globals())
