"""The model that a command line names: a factory in a file or a module, or a timm model; weights from a file."""

import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from planmill.engine.errors import PlanError, first_line


def load_model(
    source: str, weights: str | os.PathLike[str] | None = None, *, random_weights: bool = False
) -> torch.nn.Module:
    """Load a model by name, in eval mode.

    Args:
        source: `module.py:factory`, `package.module:factory` (a function or class that takes no arguments and gives an
            nn.Module), or the name of a timm model.
        weights: safetensors or a state dict saved by torch.save; read without running any code in it.
        random_weights: lets a timm model keep its random weights where `weights` is None.

    Raises:
        PlanError: no such file, module, factory or model; no weights; weights that do not fit.
    """
    if weights is not None and random_weights:
        raise PlanError("weights are given, and random ones are asked for: choose one")
    if ":" in source:
        model = _from_factory(source)
    elif source.endswith(".py") or os.sep in source:
        raise PlanError(f"{source}: say which function or class of the file makes the model: {source}:NAME")
    else:
        model = _from_timm(source)
        if weights is None and not random_weights:
            raise PlanError(f"{source}: give its weights (--weights FILE), or allow random ones (--random-weights)")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill a model from a file, every parameter and buffer of it.

    Args:
        model: changed in place.
        path: safetensors, or a state dict saved by torch.save, alone or below "state_dict" or "model".

    Raises:
        PlanError: the file cannot be read, or its names or shapes are not the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanError(f"{path}: no such file")
    state = _read_weights(path)
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise PlanError(f"{path}: does not fit the model: {lines[min(1, len(lines) - 1)]}") from error
    for what, names in (("lacks", found.missing_keys), ("has too much:", found.unexpected_keys)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise PlanError(f"{path}: does not fit the model: it {what} {', '.join(names[:3])}{more}")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file

            return load_file(path)
        except safetensors.SafetensorError as error:
            raise PlanError(f"{path}: no safetensors file: {first_line(error)}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise PlanError(f"{path}: no state dict that can be read safely: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise PlanError(f"{path}: holds no state dict (tensors by name)")
    return dict(content)


def _from_factory(source: str) -> torch.nn.Module:
    place, _, name = source.rpartition(":")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        raise PlanError(f"{place} has no function or class named {name!r}")
    try:
        model = factory()
    except TypeError as error:
        raise PlanError(f"{source}: must work without arguments: {first_line(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise PlanError(f"{source}: must give an nn.Module, gave {type(model).__name__}")
    return model


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise PlanError(f"{path}: no such file")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent))  # as `python file.py` does: the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise PlanError(f"{path}: cannot be imported: {error}") from error
    return module


def _module_by_name(name: str) -> Any:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise PlanError(f"{name}: cannot be imported: {error}") from error


def _from_timm(name: str) -> torch.nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise PlanError(
            f"{name}: a name without a colon means a timm model, and timm is not installed: pip install "
            "'planmill[models]', or write module.py:factory"
        )
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else "; or write module.py:factory"
        raise PlanError(f"timm has no model named {name!r}{hint}")
    return timm.create_model(name, pretrained=False)
