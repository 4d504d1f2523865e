"""convolve_with_winograd at layers of EfficientAD (4 x 4) and ResNet (3 x 3), on channels-last images.

The peers' weights, and ours, are prepared beforehand. Error: largest difference from float64, over the largest result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.convolution import convolve_with_winograd, transform_weight

from ..cases import Case, Draw, Goal, Peer

PACKED, EAGER = "oneDNN, weight packed", "torch conv2d"
LAYERS = {  # C, K, r, side of the input, padding
    "efficient_ad_conv2": (128, 256, 4, 126, 0),
    "efficient_ad_conv3": (256, 256, 3, 61, 0),
    "efficient_ad_conv4": (256, 768, 4, 59, 0),
    "resnet_layer1": (64, 64, 3, 56, 1),
    "resnet_layer2": (128, 128, 3, 28, 1),
    "resnet_layer3": (256, 256, 3, 14, 1),
}


def make(batch: int, channels: int, outputs: int, size: int, side: int, padding: int) -> Callable[[Draw], tuple]:
    """An image, weights that keep its size, and what we make of them."""

    def draw_all(draw: Draw) -> tuple:
        x = draw.normal(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        weight = draw.normal(outputs, channels, size, size) / (size * channels**0.5)
        return x, weight, draw.normal(outputs), transform_weight(weight), padding

    return draw_all


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, transformed: torch.Tensor, padding: int) -> Any:
    """One convolution."""
    return convolve_with_winograd(x, transformed, bias, size=weight.shape[2], padding=padding)


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.Tensor, padding: int) -> Callable:
    """PyTorch's convolution, which packs the weight at every call."""
    last = weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, last, bias, padding=padding)


def frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.Tensor, padding: int) -> Callable:
    """oneDNN's convolution with the weight packed for it, as a frozen program calls it."""
    pads, ones = [padding, padding], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, pads, ones, ones, 1, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, pads, ones, ones, 1, "none", [], "")


def check(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    x, weight, bias, _, padding = args
    i = int(torch.randint(len(x), ()))
    want = F.conv2d(x[i : i + 1].double(), weight.double(), bias.double(), padding=padding)[0]
    return float((found[i].double() - want).abs().max() / want.abs().max())


def flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.Tensor, padding: int) -> float:
    """Of the definition."""
    pixels = (x.shape[2] + 2 * padding - weight.shape[2] + 1) * (x.shape[3] + 2 * padding - weight.shape[2] + 1)
    return 2.0 * x.shape[0] * pixels * weight.numel()


CASES = [
    Case(
        op="winograd_convolution",
        id=f"{name}-{batch}",
        make=make(batch, *sizes),
        small=make(1, 8, 8, sizes[2], 9, sizes[4]),
        ours=ours,
        peers={PACKED: Peer(frozen, devices=("cpu",)), EAGER: Peer(eager, devices=("cpu",))},
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=flops,
        dtypes=(torch.float32,),
        devices=("cpu",),
        goals=(Goal("ratio", 1.2, peer=PACKED),) if name.startswith("efficient_ad") else (),
        memory=True,
    )
    for name, sizes in LAYERS.items()
    for batch in ((1, 16) if name.startswith("resnet") else (1,))
]
