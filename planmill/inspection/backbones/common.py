"""What every backbone is to the pipeline, and what the sources share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planmill.errors import PlanmillError

DEFAULT_SIZE = 518  # MuSc; rounded down to whole patches


@dataclass(frozen=True)
class Backbone:
    """A network with what must be known to feed it.

    Args:
        module: see `planmill.inspection.backbones`.
        name: as the user gave it.
        source: where the network comes from, e.g. "timm 1.0.31".
        weights: where its weights come from.
        layers: zero-based blocks, where known.
        image_size: (height, width) in pixels.
        grid: (rows, columns) of the patches.
        mean, std: per channel, of pictures scaled to 0..1.
    """

    module: nn.Module
    name: str
    source: str
    weights: str
    layers: tuple[int, ...] | None
    image_size: tuple[int, int]
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] uint8 -> float32 input of the module."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def pair(value: Any, what: str) -> tuple[int, int]:
    """One number or two as two positive integers.

    Raises:
        PlanmillError: neither.
    """
    values = (value, value) if isinstance(value, int) else value
    if isinstance(values, Sequence) and len(values) == 2 and all(isinstance(v, int) and v > 0 for v in values):
        return int(values[0]), int(values[1])
    raise PlanmillError(f"the backbone's {what} must be one or two positive integers, got {value!r}")


def choose_layers(depth: int, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The blocks to take: those asked for, or the ends of the four quarters of `depth` blocks.

    Raises:
        PlanmillError: a block that does not exist, or one named twice.
    """
    if asked is None:
        return tuple(sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)}))
    if not asked or min(asked) < 0 or max(asked) >= depth or len(set(asked)) != len(asked):
        given = ",".join(map(str, asked))
        raise PlanmillError(f"--layers {given}: the backbone has blocks 0 to {depth - 1}; name each at most once")
    return tuple(sorted(asked))


def choose_size(patch: int, asked: int | None) -> int:
    """The side of the input: the one asked for, or 518 rounded down to whole patches.

    Raises:
        PlanmillError: no multiple of the patch size.
    """
    if asked is None:
        return DEFAULT_SIZE // patch * patch
    if asked < patch or asked % patch:
        near = max(asked // patch, 1) * patch
        raise PlanmillError(f"--size {asked}: must be a multiple of the backbone's patch size {patch}, e.g. {near}")
    return asked


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors or from torch.save (tensors only: no code of the file is run).

    Raises:
        PlanmillError: no such file, or none of the two.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise PlanmillError(f"--weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PlanmillError(f"--weights {path}: neither safetensors nor a torch state dict: {first}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not (isinstance(loaded, dict) and loaded and all(isinstance(v, torch.Tensor) for v in loaded.values())):
        raise PlanmillError(f"--weights {path}: holds no state dict (names and tensors)")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in loaded.items()}


def name_some(names: Iterable[str]) -> str:
    """The first three of some names, and how many more."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
