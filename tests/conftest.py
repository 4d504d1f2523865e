"""Set-up of all tests: threads, the Triton interpreter where there is no GPU, torchvision's CPU import, fixed seeds."""

import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for every core
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels are defined at import


def _define_torchvision_ops() -> None:
    """torchvision has no CPU build beside torch's CPU wheel; its import needs these two schemas to exist."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_torchvision_library"] = library  # the definitions live as long as this object


if not torch.cuda.is_available():
    _define_torchvision_ops()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tests marked gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are collected only where a device is asked for: elsewhere they are absent, not skipped."""
    if config.getoption("--device") == "cuda":
        return
    for item in [item for item in items if item.get_closest_marker("gpu")]:
        items.remove(item)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for the test, so that what a kernel divides among threads is divided in a worker of xdist too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of the test, the same in every run."""
    return torch.Generator().manual_seed(0)
