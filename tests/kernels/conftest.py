"""Kernels compiled by g++ for a test: of one instruction set, in a program that checks them; and CUDA C++ on the host,
behind common/cuda_emulation.h and called as the launcher calls it.
"""

import ctypes
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planmill.kernels.common import cuda

CSRC = Path(__file__).parents[2] / "csrc"
EMULATION = Path(__file__).parent / "common" / "cuda_emulation.h"
PROGRAM = """
#include "{emulation}"
#include "{source}"
extern "C" int emulate(unsigned grid, unsigned threads, size_t shared, void* const* args) {{
  return emulated::launch({kernel}, grid, threads, shared, args);
}}
"""

Launch = Callable[..., None]
Check = Callable[..., None]


@pytest.fixture
def check_kernels(request: pytest.FixtureRequest, tmp_path: Path) -> Check:
    """Compiles NAME_check.cpp, which stands beside the test, with kernels of an instruction set, and runs it.

    Called with "family/NAME_level", their source in csrc, with flags of the compiler; `emulated`: over the plain C++
    of common/vec.h; `kernels`: the function that gives them, where it is not called as the source is.
    """

    def check(source: str, *flags: str, emulated: bool = False, kernels: str = "") -> None:
        name = source.rpartition("/")[2]
        beside = request.path.with_name(f"{name.rpartition('_')[0]}_check.cpp")
        command = ["g++", "-std=c++20", "-fno-math-errno", f"-I{CSRC}", f"-DKERNELS={kernels or name}", *flags]
        command += ["-DPLANMILL_EMULATE"] * emulated
        command += [str(beside), str(CSRC / f"{source}.cpp"), "-o", str(tmp_path / "check")]
        subprocess.run(command, check=True)
        result = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr[-2000:]
        assert result.stdout.endswith("0 failures\n")

    return check


def packed(value: torch.Tensor | float) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


@pytest.fixture(scope="session")
def host_launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Stands in for `cuda.launch`, with tensors of the CPU: same arguments, same source."""
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def build(source: str, kernel: str) -> ctypes.CDLL:
        program, library = folder / f"{kernel}.cpp", folder / f"{kernel}.so"
        program.write_text(PROGRAM.format(emulation=EMULATION, source=cuda.SOURCES / source, kernel=kernel))
        flags = ["-O1", "-std=c++20", "-Wall", "-pthread", "-fPIC", "-shared", f"-I{cuda.SOURCES.parent}"]
        subprocess.run(["g++", *flags, str(program), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    def launch(source: str, kernel: str, grid: int, threads: int, shared: int, *args: torch.Tensor | float) -> None:
        values = [packed(a) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        failed = build(source, kernel).emulate(grid, threads, ctypes.c_size_t(shared), pointers)
        assert not failed, (
            f"{kernel}: {('', 'stores past the shared memory it asked for', 'cannot be launched')[failed]}"
        )

    return launch


@pytest.fixture
def cuda_on_the_host(monkeypatch: pytest.MonkeyPatch, host_launch: Launch) -> None:
    """Launchers that call CUDA C++ run it on the host."""
    monkeypatch.setattr(cuda, "launch", host_launch)
