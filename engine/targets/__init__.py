"""Targets: what a captured program is compiled to. Each is a module with `compile_program` and `load_payload`."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch

from planmill.engine.capture import Captured
from planmill.engine.errors import PlanError

TARGETS = {"aoti": "planmill.engine.targets.aoti"}

Runner = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Target(Protocol):
    """What the engine asks of a target."""

    def compile_program(self, captured: Captured, folder: Path) -> Path:
        """Compile a captured model to one payload file in `folder`."""

    def load_payload(self, path: Path) -> Runner:
        """Load a payload: contiguous inputs in order -> outputs in order. The file may be deleted afterwards."""


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        PlanError: there is none; the message lists those that exist.
    """
    if name not in TARGETS:
        raise PlanError(f"no target named {name!r}; there is {', '.join(TARGETS)}")
    return cast(Target, importlib.import_module(TARGETS[name]))
