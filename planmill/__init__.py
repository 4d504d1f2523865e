"""Planmill: accelerated layers and inference plans for models that the usual engines serve badly.

Importing it starts no GPU context, compiles nothing and patches nothing; names are loaded on first use.
"""

import importlib
from typing import Any

from planmill._version import __version__

__all__ = ["PlanmillError", "__version__"]

_MODULES = ("kernels", "engine", "errors", "cli")


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _MODULES:
        return importlib.import_module(f"planmill.{name}")
    if name == "PlanmillError":
        return importlib.import_module("planmill.errors").PlanmillError
    kernels = importlib.import_module("planmill.kernels")
    for family in kernels.families():
        module = importlib.import_module(f"planmill.kernels.{family}")
        if name in module.__all__:
            return getattr(module, name)
    engine = importlib.import_module("planmill.engine")
    if name in engine.__all__:
        return getattr(engine, name)
    raise AttributeError(f"module 'planmill' has no attribute {name!r}")
