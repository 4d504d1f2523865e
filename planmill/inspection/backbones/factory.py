"""Backbones from a user's file: `file.py:factory`."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from planmill.errors import PlanmillError
from planmill.inspection.backbones.common import Backbone, pair


def load_factory_backbone(
    name: str, path: Path, attribute: str, weights: Path | None, layers: Sequence[int] | None, size: int | None
) -> Backbone:
    """Run the file, call the factory with what the user gave, and check what it returns.

    Raises:
        PlanmillError: no such file or callable, an option that the factory does not take, an error inside it, or a
            result that is no backbone; each names the backbone.
    """
    factory = _import(name, path, attribute)
    given = {"weights": weights, "layers": None if layers is None else tuple(layers), "size": size}
    options = {key: value for key, value in given.items() if value is not None}
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    refused = [] if takes_all else sorted(options.keys() - parameters.keys())
    if refused:
        raise PlanmillError(f"--backbone {name}: {attribute}() does not take --{refused[0]}")
    module = _call(name, lambda: factory(**options))
    if not isinstance(module, nn.Module):
        raise PlanmillError(f"--backbone {name}: must return an nn.Module, got {type(module).__name__}")
    missing = [key for key in ("image_size", "grid", "mean", "std") if not hasattr(module, key)]
    if missing:
        raise PlanmillError(
            f"--backbone {name}: the module has no attribute {', '.join(missing)} (see docs/inspect.md)"
        )
    mean, std = _per_channel(name, module)
    kept: Any = getattr(module, "layers", None)
    return Backbone(
        module=module.eval(),
        name=name,
        source=f"{path.name}:{attribute}",
        weights=str(weights) if weights else "the factory's own",
        layers=tuple(kept) if isinstance(kept, Sequence) and all(isinstance(i, int) for i in kept) else None,
        image_size=pair(module.image_size, "image_size"),
        grid=pair(module.grid, "grid"),
        mean=mean,
        std=std,
    )


def _import(name: str, path: Path, attribute: str) -> Callable[..., Any]:
    if not path.is_file():
        raise PlanmillError(f"--backbone {name}: no file {path}")
    path = path.resolve()
    unique = f"_planmill_backbone_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, path)
        if spec is None or spec.loader is None:
            raise PlanmillError(f"--backbone {name}: {path} is no Python file")
        module, loader = importlib.util.module_from_spec(spec), spec.loader
        sys.path.insert(0, str(path.parent))  # as `python file.py` would: its neighbours can be imported
        sys.modules[unique] = module
        try:
            _call(name, lambda: loader.exec_module(module))
        except PlanmillError:
            del sys.modules[unique]
            raise
        finally:
            sys.path.remove(str(path.parent))
    found = getattr(sys.modules[unique], attribute, None)
    if not callable(found):
        raise PlanmillError(f"--backbone {name}: {path.name} has no callable {attribute!r}")
    return found


def _call(name: str, function: Callable[[], Any]) -> Any:
    """Call a user's code; whatever it raises becomes one line, with the error kept as its cause."""
    try:
        return function()
    except PlanmillError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise PlanmillError(f"--backbone {name}: {type(error).__name__}: {first}") from error


def _per_channel(name: str, module: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (tuple(float(v) for v in values) for values in (module.mean, module.std))  # type: ignore[union-attr]
    if len(mean) not in (1, 3) or len(std) != len(mean) or min(std) <= 0:
        raise PlanmillError(f"--backbone {name}: mean and std must hold 1 or 3 numbers each, and no std may be 0")
    return mean, std
