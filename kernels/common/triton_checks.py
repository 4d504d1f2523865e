"""Stub, replaced below."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StaticKernel:
    """A kernel with the choices that ship."""

    kernel: Any
    pointers: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    tensor_core: bool = False
    name: str = ""
