"""y = pool(act(W * x + b)), W out of its panels; float64."""

import torch
from torch.nn import functional as F

from planmill.kernels.convolution.stem_convolution.packing import unpack_kernel


def stem_convolution_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    stride: int,
    padding: int,
    activation: str,
    pooling: str,
    pool_size: int,
    pool_stride: int,
    pool_padding: int,
    count_include_pad: bool,
) -> torch.Tensor:
    """y [B, H', W', K] of the dtype of x, from x [B, C, H, W] and W [P, C, r, s, 16] of K channels."""
    weight = unpack_kernel(packed.double(), bias.shape[0])
    y = F.conv2d(x.double(), weight, bias.double(), stride=stride, padding=padding)
    if activation == "relu":
        y = F.relu(y)
    if pooling == "max":
        y = F.max_pool2d(y, pool_size, pool_stride, pool_padding)
    elif pooling == "average":
        y = F.avg_pool2d(y, pool_size, pool_stride, pool_padding, count_include_pad=count_include_pad)
    return y.permute(0, 2, 3, 1).contiguous().to(x.dtype)
