"""Pixels of whatever an image file holds, in eight bits."""

import numpy as np
from PIL import Image

_EIGHT_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 257 is odd: no value lies halfway


def eight_bit(image: Image.Image) -> Image.Image:
    """As L or RGB. 16-bit values are divided by 257, transparency shows black, floating point must lie in 0..1."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        limit = 1 if image.mode == "F" else 65535
        if not (np.isfinite(values).all() and values.min(initial=0) >= 0 and values.max(initial=0) <= limit):
            raise ValueError(f"pixel values of mode {image.mode} outside 0..{limit:g}")
        if image.mode == "F":
            return Image.fromarray(np.round(values.astype(np.float64) * 255).astype(np.uint8))
        return Image.fromarray(_EIGHT_BITS[values])
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        black = Image.new("RGBA", layered.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, layered).convert("RGB")
    return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB")
