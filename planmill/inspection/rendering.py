"""Heat maps as pictures. One colour scale for the whole set, so that colours can be compared."""

import io
from functools import cache

import numpy as np
import torch
from PIL import Image

from planmill.inspection.scoring import interpolate_maps

COLORMAP = "inferno"
REPORT_SIDE = 96
_OPACITY = 0.85


@cache
def palette() -> np.ndarray:
    """The colour scale: [256, 3] uint8."""
    import matplotlib

    return (matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def levels(scores: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """Patch scores [rows, columns] interpolated to `size` (height, width) as uint8: 0 is scale[0], 255 is scale[1]."""
    low, high = scale
    full = interpolate_maps(torch.from_numpy(scores).float()[None], size)[0]
    span = high - low if high > low else 1.0
    return ((full - low) / span * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def heatmap_png(scores: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> bytes:
    """PNG of `size` (width, height) with a palette: the index of a pixel is its score on the scale, 0 to 255."""
    image = Image.fromarray(levels(scores, (size[1], size[0]), scale))
    image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def heatmap_layer(scores: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> bytes:
    """Small WebP of the aspect of `size` (width, height), to lay over the picture: opaque where the score is high."""
    factor = min(1.0, REPORT_SIDE / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    index = levels(scores, (height, width), scale)
    alpha = (index * _OPACITY).round().astype(np.uint8)
    image = Image.fromarray(np.dstack([palette()[index], alpha]))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()
