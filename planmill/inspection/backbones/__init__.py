"""The networks that patch features come from, by name.

A backbone is an `nn.Module` in eval mode:

    forward(pictures [N, C, H, W] float32) -> (tokens, descriptor)
        tokens      list of [N, P, D] float32, one per layer, row-major over the grid, without class tokens
        descriptor  [N, E] float32, one vector per picture
    image_size      (H, W) in pixels, or one number
    grid            (rows, columns) of the patches, rows * columns = P
    mean, std       one number per channel: 1 (grey) or 3 (RGB); pictures are scaled to 0..1, then (x - mean) / std

`file.py:factory` names a callable that returns one; what the user gives of `weights` (a path), `layers` (a tuple) and
`size` (pixels) arrives by keyword.
"""

from planmill.inspection.backbones.common import Backbone
from planmill.inspection.backbones.resolve import resolve_backbone

__all__ = ["Backbone", "resolve_backbone"]
