"""The versions and the instruction sets that a plan is tied to."""

import functools
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

import torch

from planmill._version import __version__
from planmill.engine.errors import PlanError
from planmill.engine.manifest import Platform, Versions

# What a compiler may emit on its own under -march=native, as Linux names it in /proc/cpuinfo.
_X86 = re.compile(
    r"sse\S*|ssse3|avx\S*|amx_\S*|fma|fma4|xop|f16c|bmi[12]|abm|popcnt|movbe|adx|aes|vaes|pclmulqdq|vpclmulqdq|gfni"
)
_ARM = re.compile(r"asimd\S*|sve\S*|bf16|i8mm|fphp|atomics|sha\S*|aes|sme\S*")


@functools.cache
def this_machine() -> Platform:
    """The system, the architecture and the instruction sets of this machine."""
    return Platform(system=sys.platform, machine=platform.machine(), isa=_instruction_sets())


def _instruction_sets() -> list[str]:
    """Read from the kernel, which lists only what it lets a process use; empty where there is no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            wanted = _X86 if key.strip() == "flags" else _ARM
            return sorted({flag for flag in value.split() if wanted.fullmatch(flag)})
    return []


def these_versions() -> Versions:
    """The versions in this environment."""
    return Versions(
        planmill=__version__,
        torch=torch.__version__,
        triton=package_version("triton"),
        tensorrt=package_version("tensorrt-rtx") or package_version("tensorrt"),
    )


def release(version: str) -> str:
    """Major, minor and patch of a version: "2.13.0" for "2.13.0+cpu"."""
    return version.partition("+")[0]


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_gpu(needs: str) -> None:
    """Say that torch finds no GPU, after what asked for one.

    Raises:
        PlanError: it finds none.
    """
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise PlanError(f"{needs}, and {why}: use a machine with an NVIDIA GPU, its driver and a CUDA build of torch")
