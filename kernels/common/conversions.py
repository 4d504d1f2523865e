"""Which modules of other libraries become which layer: a layer registers its constructors, the engine asks by class."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)
_CONSTRUCTORS: dict[str, Callable[[nn.Module], nn.Module]] = {}


def register_conversion(class_name: str, build: Callable[[nn.Module], Layer]) -> None:
    """Let `build` make the layer of every module whose class has that name.

    By name, so that the other library need not be installed, let alone imported.

    Raises:
        ValueError: another constructor has the class.
    """
    if class_name in _CONSTRUCTORS:
        raise ValueError(f"register_conversion: {class_name} has a constructor")
    _CONSTRUCTORS[class_name] = build


def find_conversion(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """The constructor that makes Planmill's layer of a published module, chosen by the name of its class.

    Args:
        module: any module; known are "MixtralSparseMoeBlock" and the like of transformers, and "HaloAttn" of timm.

    Returns:
        The constructor, e.g. `SparseMoE.from_mixtral`, or None where there is none. The layer that it makes shares the
        module's parameters, except where it keeps them in another layout. What does not fit, the constructor says.

    Source: the class names of transformers 5 and timm 1.
    """
    return _CONSTRUCTORS.get(type(module).__name__)
