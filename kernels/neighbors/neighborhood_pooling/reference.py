"""LNAMD: joint LayerNorm of an image, r x r average, unit rows; float64."""

import torch
from torch.nn import functional as F


def neighborhood_pooling_reference(features: torch.Tensor, height: int, width: int, size: int) -> torch.Tensor:
    """Unit rows [N, P, C] of the dtype of `features`."""
    n, p, c = features.shape
    f = features.double()
    f = F.layer_norm(f, (p, c), eps=1e-5)  # one mean and one variance per image, over patches and channels
    if size > 1:
        image = f.transpose(1, 2).reshape(n, c, height, width)
        f = F.avg_pool2d(image, size, 1, size // 2, count_include_pad=True).reshape(n, c, p).transpose(1, 2)
    return F.normalize(f, dim=2).to(features.dtype).contiguous()
