"""The C++ extension and the instruction sets that it may use."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

LEVELS = ("baseline", "avx2", "avx512", "amx")


@functools.cache
def extension() -> ModuleType | None:
    """`planmill.kernels._C`, or None where it was not built (no compiler at install time)."""
    try:
        return importlib.import_module("planmill.kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "planmill.kernels._C":
            raise
        return None


def cpu_capabilities() -> tuple[str, ...]:
    """The levels this machine can run, lowest first: "baseline", "avx2", "avx512" (F, BW, VL, VNNI), "amx" (bf16).

    AMX counts only where the kernel granted this process its tile registers.
    """
    module = extension()
    return LEVELS[: module.cpu_capability_limit() + 1] if module is not None else ()


@contextmanager
def cpu_capability(level: str) -> Iterator[None]:
    """Hold the C++ kernels to an instruction set, for tests and benchmarks; process-wide.

    Raises:
        ValueError: the level is unknown or this machine does not have it.
    """
    available = cpu_capabilities()
    if level not in available:
        raise ValueError(f"cpu_capability: this machine has {', '.join(available) or 'no extension'}, not {level!r}")
    module = extension()
    assert module is not None
    before = module.cpu_capability()
    module.set_cpu_capability(LEVELS.index(level))
    try:
        yield
    finally:
        module.set_cpu_capability(before)
