"""From what the user wrote after --backbone to a Backbone."""

from collections.abc import Sequence
from pathlib import Path

import planmill
from planmill.errors import PlanmillError
from planmill.inspection.backbones.common import Backbone


def resolve_backbone(
    name: str, weights: Path | None = None, layers: Sequence[int] | None = None, size: int | None = None
) -> Backbone:
    """The backbone of that name.

    Args:
        name: `digits`; `file.py:factory`; `hf:org/model`, `org/model` or a folder with a config.json (transformers);
            anything else is a timm name.
        weights: a local file of weights; None: the user's cache, or what the factory does.
        layers: zero-based blocks; None: the ends of the four quarters.
        size: side of the input in pixels; None: 518 rounded down to whole patches, or what the factory says.

    Raises:
        PlanmillError: no such backbone, or its weights cannot be had; says how to give them.
    """
    if weights is not None and not weights.is_file():
        raise PlanmillError(f"--weights {weights}: no such file")
    path, separator, attribute = name.rpartition(":")
    if name == "digits":
        path, separator, attribute = str(_digits_example()), ":", "factory"
    if separator and path.endswith(".py"):
        from planmill.inspection.backbones.factory import load_factory_backbone

        return load_factory_backbone(name, Path(path), attribute, weights, layers, size)
    if name.endswith(".py"):
        raise PlanmillError(f"--backbone {name}: say which callable returns the backbone, e.g. {name}:factory")
    if name.startswith("hf:") or ("/" in name and not name.startswith("timm/")):
        from planmill.inspection.backbones.transformers import load_transformers_backbone

        return load_transformers_backbone(name, weights, layers, size)
    from planmill.inspection.backbones.timm import load_timm_backbone

    return load_timm_backbone(name, weights, layers, size)


def _digits_example() -> Path:
    """The example stands beside the package in a checkout; a wheel does not carry it."""
    path = Path(planmill.__file__).resolve().parent.parent / "examples" / "digits" / "model.py"
    if not path.is_file():
        raise PlanmillError(
            "--backbone digits: the example is part of the repository, not of the installed package; in a checkout "
            "give --backbone examples/digits/model.py:factory"
        )
    return path
