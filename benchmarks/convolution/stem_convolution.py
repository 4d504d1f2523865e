"""convolve_and_pool at first layers: EfficientAD's networks and encoder, ResNet's, one of six channels; NCHW images.

The peers' weights, and ours, are prepared beforehand, but for eager PyTorch's, which packs them at every call. Error:
largest difference from float64, over the largest result.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.convolution import convolve_and_pool, pack_kernel

from ..cases import Case, Draw, Goal, Peer

EAGER, COMPILED, FROZEN = "torch", "torch.compile", "oneDNN, weight packed, + compiled relu and pool"
NONE, HALVES, LARGEST = ("none", 1, 1, 0), ("average", 2, 2, 0), ("max", 3, 2, 1)
LAYERS = {  # C, K, side of the kernel, side of the image, stride, padding, pooling
    "efficient_ad": (3, 128, 4, 256, 1, 0, HALVES),
    "efficient_ad_padded": (3, 128, 4, 256, 1, 3, ("average", 2, 2, 1)),
    "efficient_ad_encoder": (3, 32, 4, 256, 2, 1, NONE),
    "resnet": (3, 64, 7, 224, 2, 3, LARGEST),
    "six_channels": (6, 64, 3, 256, 1, 1, NONE),
}
Pool = tuple[str, int, int, int]


def make(batch: int, channels: int, outputs: int, size: int, side: int, *settings: Any) -> Callable[[Draw], tuple]:
    """An image, weights that keep its size, and what we make of them."""

    def draw_all(draw: Draw) -> tuple:
        x, bias = draw.normal(batch, channels, side, side), draw.normal(outputs)
        weight = draw.normal(outputs, channels, size, size) / (size * channels**0.5)
        return x, weight, bias, pack_kernel(weight), *settings

    return draw_all


def ours(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    packed: torch.Tensor,
    stride: int,
    padding: int,
    pool: Pool,
) -> Any:
    """One layer."""
    name, size, step, pad = pool
    return convolve_and_pool(
        x, packed, bias, stride=stride, padding=padding, activation="relu",
        pooling=name, pool_size=size, pool_stride=step, pool_padding=pad,
    )  # fmt: skip


def finish(y: torch.Tensor, pool: Pool) -> torch.Tensor:
    """ReLU and pooling."""
    name, *window = pool
    y = F.relu(y)
    return F.max_pool2d(y, *window) if name == "max" else F.avg_pool2d(y, *window) if name == "average" else y


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *settings: Any) -> torch.Tensor:
    """The definition, in the dtype of x."""
    _, stride, padding, pool = settings
    return finish(F.conv2d(x, weight, bias, stride, padding), pool)


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *settings: Any) -> Callable:
    """PyTorch's three calls, all of them channels-last, which is faster."""
    last = weight.contiguous(memory_format=torch.channels_last)
    return lambda: layer(x.contiguous(memory_format=torch.channels_last), last, bias, *settings)


def compiled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *settings: Any) -> Callable:
    """The same in one compiled function; weights are constants of it, as in a model in eval mode."""
    return functools.partial(torch.compile(eager(x, weight, bias, *settings), dynamic=False))


def frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *settings: Any) -> Callable:
    """What a frozen program consists of: oneDNN's convolution of packed weights, and one loop behind it."""
    _, stride, padding, pool = settings
    pads, steps, ones = [padding, padding], [stride, stride], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, pads, steps, ones, 1, list(x.shape))
    rest = torch.compile(functools.partial(finish, pool=pool), dynamic=False)

    def call() -> torch.Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        y = torch.ops.mkldnn._convolution_pointwise(last, packed, bias, pads, steps, ones, 1, "none", [], "")
        return rest(y)

    return call


def check(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    x, weight, bias, *settings = args
    i = int(torch.randint(len(x), ()))
    want = layer(x[i : i + 1].double(), weight.double(), bias.double(), *settings)[0]
    return float((found[i].double() - want).abs().max() / want.abs().max())


def flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *settings: Any) -> float:
    """Of the convolution."""
    _, stride, padding, _ = settings
    rows, columns = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])
    return 2.0 * len(x) * rows * columns * weight.numel()


CASES = [
    Case(
        op="stem_convolution",
        id=f"{name}-{batch}",
        make=make(batch, *sizes),
        small=make(1, *sizes[:3], 12, *sizes[4:]),
        ours=ours,
        peers={
            EAGER: Peer(eager, devices=("cpu",)),
            COMPILED: Peer(compiled, devices=("cpu",)),
            FROZEN: Peer(frozen, devices=("cpu",)),
        },
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=flops,
        dtypes=(torch.float32,),
        devices=("cpu",),
        goals=tuple(Goal("ratio", 1.0, peer=peer) for peer in (EAGER, COMPILED)),
        memory=True,
    )
    for name, sizes in LAYERS.items()
    for batch in ((1, 16) if name == "resnet" else (1,))
]
