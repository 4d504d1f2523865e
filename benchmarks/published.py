"""Blocks of transformers and timm as peers, imported where a checkout is on the path and torchvision misfits torch."""

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_KEPT: list[torch.library.Library] = []  # definitions live as long as these


def load(module: str) -> Any:
    """A module of transformers or timm by its full name.

    transformers takes the checkout's kernels/ for a package of its own, so the checkout is off the path meanwhile; and
    torchvision beside torch's CPU wheel needs the schemas of two ops to exist before it can be imported.
    """
    if not _KEPT and not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
        _KEPT.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    root = str(Path(__file__).resolve().parents[1])
    with mock.patch.object(sys, "path", [entry for entry in sys.path if entry not in ("", root)]):
        return importlib.import_module(module)


def modeling(family: str) -> Any:
    """`transformers.models.<family>.modeling_<family>`."""
    return load(f"transformers.models.{family}.modeling_{family}")
