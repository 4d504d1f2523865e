"""The CUDA C++ launcher: what it hands to CuPy, what is said without it, and that a package holds its sources."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from planmill.errors import PlanmillError
from planmill.kernels.common import cuda

ROOT = Path(__file__).parents[3]
SORT = "routing/sort_experts.cu"


class Kernel:
    """Stands in for a CuPy kernel and notes its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: tuple, block: tuple, args: tuple, shared_mem: int) -> None:
        self.launches.append((grid, block, args, shared_mem))


@pytest.fixture
def fresh() -> Iterator[None]:
    """No kernel is held from before, none is left behind."""
    cuda.compiled.cache_clear()
    yield
    cuda.compiled.cache_clear()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, fresh: None) -> tuple[Kernel, list[Any]]:
    """A CuPy that compiles nothing; the kernel it returns, and the modules and streams it was asked for."""
    kernel, seen = Kernel(), []

    def module(code: str, options: tuple[str, ...]) -> Any:
        seen.append((code, options))
        return SimpleNamespace(get_function=lambda name: kernel)

    def from_external(stream: Any) -> Any:
        seen.append(stream)
        return nullcontext()

    device = SimpleNamespace(Device=lambda index: nullcontext(), Stream=SimpleNamespace(from_external=from_external))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=device, RawModule=module))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"stream of {index}")
    return kernel, seen


def test_what_is_launched(fake: tuple[Kernel, list[Any]]) -> None:
    kernel, seen = fake
    data = torch.arange(8, dtype=torch.int32)
    for shared in (cuda.SHARED_BYTES, cuda.SHARED_BYTES + 4):
        cuda.launch(SORT, "sort_experts", 3, 64, shared, data[2:], 2**31 - 1, -1, 0.1)
    source, *streams = seen
    assert source[0] == (ROOT / "csrc" / "cuda" / SORT).read_text(), "compiled once, from the source"
    assert streams == ["stream of None"] * 2  # the index of a CPU tensor's device
    assert [launch[:2] + launch[3:] for launch in kernel.launches] == [
        ((3,), (64,), cuda.SHARED_BYTES),
        ((3,), (64,), cuda.SHARED_BYTES + 4),
    ]
    assert kernel.max_dynamic_shared_size_bytes == cuda.SHARED_BYTES + 4, "more than a block has is asked for"
    args = kernel.launches[0][2]
    assert [(type(a), int(a)) for a in args] == [
        (np.uint64, data.data_ptr() + 8),
        (np.int32, 2**31 - 1),
        (np.int32, -1),
        (np.float32, 0),
    ]
    assert args[3] == np.float32(0.1)  # fmt: skip


@pytest.mark.usefixtures("fresh")
def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(PlanmillError, match=r"sort_experts: .* needs CuPy.*pip install 'planmill\[gpu\]'"):
        cuda.launch(SORT, "sort_experts", 1, 32, 0, torch.zeros(1))


def test_an_installed_package_holds_the_sources(tmp_path: Path) -> None:
    """Without a compiler, so that nothing but files is built; they lie where an installed `cuda.SOURCES` looks."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), "--build-lib",
               str(tmp_path / "lib")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CXX": "no-compiler"}, check=True, capture_output=True)
    package = tmp_path / "lib" / "planmill"
    assert (package / "kernels" / "common" / "cuda.py").is_file()
    assert Path(cuda.__file__).parents[2] / "csrc" / "cuda" == cuda.SOURCES
    want = {path.relative_to(cuda.SOURCES) for path in cuda.SOURCES.rglob("*.cu")}
    assert Path(SORT) in want
    assert {path.relative_to(package / "csrc" / "cuda") for path in package.rglob("*.cu")} == want


def test_which_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from planmill import kernels
    from planmill.kernels.common import backends

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_installed", lambda name: True)
    assert kernels.which("expert_mixture", "cuda").backend == "Triton and CUDA C++"
    assert kernels.which("knn", "cuda").backend == "Triton"
    monkeypatch.setattr(backends, "_installed", lambda name: name != "cupy")
    assert kernels.which("knn", "cuda").backend == "Triton"
    choice = kernels.which("expert_mixture", "cuda")
    assert (choice.backend, choice.missing) == ("none", ("cupy is not installed (pip install 'planmill[gpu]')",))


def test_a_plan_holds_no_cuda_source() -> None:
    with cuda.followed():
        with cuda.followed():
            pass
        with pytest.raises(
            PlanmillError, match=r"sort_experts is CUDA C\+\+ .csrc/cuda/routing/sort_experts.cu., and a pl"
        ):
            cuda.launch(SORT, "sort_experts", 1, 32, 0, torch.zeros(1))
    assert not cuda.is_followed()
