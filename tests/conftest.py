"""Set-up of all tests: the Triton interpreter where there is no GPU, torchvision's CPU import, fixed seeds."""

import os

import pytest
import torch

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
def generator() -> torch.Generator:
    """Random numbers of the test, the same in every run."""
    return torch.Generator().manual_seed(0)
