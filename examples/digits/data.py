"""scikit-learn's handwritten digits (8 x 8, real scans from the UCI set) as 32 x 32 pictures, and the fixed split."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HELD_OUT = 0.45
SEED = 0


class Split(NamedTuple):
    """One part of the data: pictures [N, 32, 32] uint8 and labels [N] int64."""

    pictures: np.ndarray
    labels: np.ndarray


def upsample(digit: np.ndarray, size: int = 32) -> np.ndarray:
    """An 8 x 8 digit with values 0..16 as a size x size uint8 picture (bicubic)."""
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8), mode="L")
    return np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))


@cache
def load() -> tuple[Split, Split]:
    """(training, held-out): 55 % and 45 % of 1797 digits, stratified by class, the same split in every run."""
    digits = load_digits()
    pictures = np.stack([upsample(digit) for digit in digits.images])
    train, test = train_test_split(
        np.arange(len(pictures)), test_size=HELD_OUT, stratify=digits.target, random_state=SEED
    )
    labels = digits.target.astype(np.int64)
    return Split(pictures[train], labels[train]), Split(pictures[test], labels[test])


def to_tensor(pictures: np.ndarray, mean: float, std: float) -> torch.Tensor:
    """uint8 pictures [N, 32, 32] as the model's input [N, 1, 32, 32] float32."""
    return ((torch.from_numpy(pictures.copy()).float() / 255 - mean) / std).unsqueeze(1)


def tray(normal: int, intruders: int = 8, count: int = 60, seed: int = SEED) -> tuple[Split, np.ndarray]:
    """A tray: `count` held-out digits of class `normal` and `intruders` of other classes, shuffled.

    Returns the pictures with their labels, and which of them are intruders ([N] bool).
    """
    held_out = load()[1]
    random = np.random.default_rng((seed, normal))
    inside = random.choice(np.flatnonzero(held_out.labels == normal), count, replace=False)
    outside = random.choice(np.flatnonzero(held_out.labels != normal), intruders, replace=False)
    chosen = random.permutation(np.concatenate([inside, outside]))
    labels = held_out.labels[chosen]
    return Split(held_out.pictures[chosen], labels), labels != normal
