"""CUDA C++ from csrc/cuda: compiled by NVRTC through CuPy at the first call, launched on torch's current stream.

A kernel is held per device; CuPy keeps the compiled binary on disk, keyed by the source's hash. Nothing waits for the
device, so that a launch after the first can be captured in a CUDA graph. Sources are package data: `planmill/csrc/cuda`
beside this package where it is installed, `csrc/cuda` where it is a checkout.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planmill.errors import PlanmillError

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
SHARED_BYTES = 48 << 10  # that a block gets without asking

_this_thread = threading.local()


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """What this thread launches is made part of a plan, which holds Triton kernels and torch's operators only."""
    before, _this_thread.followed = is_followed(), True
    try:
        yield
    finally:
        _this_thread.followed = before


def is_followed() -> bool:
    """Whether a launcher must do without CUDA C++."""
    return getattr(_this_thread, "followed", False)


@functools.cache
def compiled(source: str, kernel: str, device: int) -> Any:
    """The kernel `kernel` of `source`, a path below csrc/cuda, on the device of that index.

    Raises:
        PlanmillError: CuPy is not installed.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        message = f"{kernel}: a CUDA C++ kernel needs CuPy, which is not installed (pip install 'planmill[gpu]')"
        raise PlanmillError(message) from None
    options = ("--std=c++17", f"--include-path={SOURCES.parent}")
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=(SOURCES / source).read_text(), options=options).get_function(kernel)


def _pack(value: torch.Tensor | float) -> np.generic:
    if isinstance(value, torch.Tensor):
        return np.uint64(value.data_ptr())
    return np.float32(value) if isinstance(value, float) else np.int32(value)


def launch(source: str, kernel: str, grid: int, threads: int, shared: int, *args: torch.Tensor | float) -> None:
    """Launch a kernel on the current stream of its tensors' device.

    Args:
        source: path below csrc/cuda.
        kernel: its name, `extern "C"`.
        grid: number of blocks.
        threads: threads of a block.
        shared: bytes of dynamic shared memory of a block.
        args: tensors of one device, passed as pointers, and numbers, passed as int or float; the first is a
            tensor.

    Raises:
        PlanmillError: CuPy is not installed, or the launcher is made part of a plan.
    """
    if is_followed():
        raise PlanmillError(f"{kernel} is CUDA C++ (csrc/cuda/{source}), and a plan holds Triton kernels only")
    device = args[0].device.index  # type: ignore[union-attr]
    function = compiled(source, kernel, device)
    import cupy

    packed = tuple(_pack(a) for a in args)
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    with cupy.cuda.Device(device), stream:
        if shared > SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared
        function((grid,), (threads,), packed, shared_mem=shared)
