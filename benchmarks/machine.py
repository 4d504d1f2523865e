"""The machine of a run: its name, its ceilings, and the versions of what ran on it."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .timing import Quantiles, Sampler, alternate

ROOT = Path(__file__).parents[1]
_PACKAGES = {"numpy": "numpy", "faiss": "faiss-cpu", "scikit-learn": "scikit-learn", "triton": "triton"}


def ceilings(device: str, dtypes: set[torch.dtype], quick: bool = False) -> dict[str, float | None]:
    """What this machine reaches: FLOP/s of a matrix product per dtype, and bytes/s of a copy (read and written).

    A half-precision product is measured only where the processor has instructions for it; elsewhere it is None.
    """
    size = 512 if quick else (8192 if device == "cuda" else 2048)
    found: dict[str, float | None] = {}
    for dtype in sorted(dtypes | {torch.float32}, key=str):
        name = str(dtype).removeprefix("torch.")
        if dtype != torch.float32 and device == "cpu" and not _fast_half(dtype):
            found[name] = None
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _p50_s(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    count = (8 << 20) if quick else ((256 << 20) if device == "cuda" else (64 << 20))
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / _p50_s(lambda: target.copy_(source), device)
    return found


def _fast_half(dtype: torch.dtype) -> bool:
    if dtype != torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _p50_s(call: Any, device: str) -> float:
    samples = alternate({"it": call}, Sampler(device), rounds=9, budget_s=0)
    return Quantiles.of(samples["it"]).p50 / 1e3


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """Hold torch, OpenMP and BLAS libraries that are loaded by now to a number of threads; None changes nothing."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _pools(threads):
            yield
    finally:
        torch.set_num_threads(before)


def _pools(threads: int) -> AbstractContextManager[Any]:
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:  # then scikit-learn, which brings it, is no peer either
        return nullcontext()
    return threadpool_limits(limits=threads)


def commit() -> str:
    """Short hash of the checkout, "-dirty" when tracked files other than results differ; "unknown" without git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions(device: str, level: str) -> dict[str, Any]:
    """What ran: package versions, processor, instruction set in use, threads, GPU and driver; None for what is absent.

    Args:
        level: the instruction set that our kernels were held to; peers choose their own.
    """
    found: dict[str, Any] = {"planmill": _installed("planmill"), "torch": torch.__version__}
    found |= {name: _installed(package) for name, package in _PACKAGES.items()}
    found |= {"python": platform.python_version(), "cpu": _cpu_model(), "isa": level}
    found |= {"threads": torch.get_num_threads(), "gpu": None, "driver": None}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return found


def name(device: str) -> str:
    """The machine's name in file names: cpu-<highest instruction set>, or the GPU's name."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    from planmill.kernels import cpu_capabilities

    return f"cpu-{(cpu_capabilities() or ('reference',))[-1]}"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None
