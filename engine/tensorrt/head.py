"""The head of a TensorRT-RTX plan: for whom it was built, and by which version."""

import struct
from dataclasses import dataclass
from pathlib import Path

from planmill.engine.errors import PlanError
from planmill.engine.tensorrt.builder import SMS

_HEAD = struct.Struct("<4s4xI4xQ4B4sI")
_HEAD_VERSION = [1, 7, 1, 116]


@dataclass(frozen=True)
class PlanHead:
    """The head of a TensorRT-RTX plan.

    Args:
        version: of the builder.
        sms: GPU architectures that the plan runs on.
    """

    version: str
    sms: tuple[int, ...]


def read_head(path: Path) -> PlanHead:
    """The head of a TensorRT-RTX plan; the layout is not documented, and was found by comparing plans of 1.7.1.116.

    Raises:
        PlanError: not such a plan, cut short, or written by another version than the layout is known for.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise PlanError(f"the TensorRT payload is cut short: it has {size} bytes")
    magic, kind, whole, *version, again, targets = _HEAD.unpack(head)
    if (magic, kind, again) != (b"vtrt", 2, b"vtrt"):
        raise PlanError("the payload is no TensorRT-RTX plan")
    if version != _HEAD_VERSION:
        found, known = (".".join(map(str, v)) for v in (version, _HEAD_VERSION))
        raise PlanError(f"the payload is a plan of TensorRT-RTX {found}, and this planmill reads the head of {known}")
    if whole != size:
        raise PlanError(f"the TensorRT payload is cut short: {size} bytes of {whole}")
    return PlanHead(".".join(map(str, version)), tuple(sm for bit, sm in enumerate(SMS) if targets >> bit & 1))
