"""attend_with_large_kernel at the stages of VAN-B1 to B4 (and B0's first), 224 x 224 images.

Error: largest difference from float64, as a share of the largest result.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.attention import attend_with_large_kernel

from ..cases import Case, Draw, Goal, Peer, plain

CHAIN = "torch conv2d chain"


def make(batch: int, channels: int, height: int, width: int) -> Callable[[Draw], tuple]:
    """An image and weights under which every convolution keeps the size of its input."""

    def draw_all(draw: Draw) -> tuple:
        return (
            draw.normal(batch, channels, height, width),
            draw.normal(channels, 1, 5, 5) / 5,
            draw.normal(channels),
            draw.normal(channels, 1, 7, 7) / 7,
            draw.normal(channels),
            draw.normal(channels, channels, 1, 1) * channels**-0.5,
            draw.normal(channels),
        )

    return draw_all


def chain(x: torch.Tensor, w5: torch.Tensor, b5: torch.Tensor, w7: torch.Tensor, b7: torch.Tensor, w: torch.Tensor,
          b: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Three convolutions and a product, as in VAN."""
    t = F.conv2d(x, w5, b5, padding=2, groups=x.shape[1])
    t = F.conv2d(t, w7, b7, padding=9, dilation=3, groups=x.shape[1])
    return x * F.conv2d(t, w, b)


def channels_last(*args: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The chain on images and weights that were laid out beforehand."""
    last = [a.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else a for a in args]
    return lambda: chain(*last)


def compiled(*args: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The chain under torch.compile; compiling is not timed."""
    call = torch.compile(chain)
    call(*args)
    return lambda: call(*args)


def check(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    i = int(torch.randint(len(args[0]), ()))
    want = chain(*(a.double() for a in (args[0][i : i + 1], *args[1:])))[0]
    return float((found[i].double() - want).abs().max() / want.abs().max())


def flops(x: torch.Tensor, *rest: torch.Tensor) -> float:
    """25 and 49 taps, and C channels, for each number; borders counted in full."""
    return 2.0 * x.numel() * (25 + 49 + x.shape[1])


CASES = [
    Case(
        op="large_kernel_attention",
        id=f"B{batch}-C{channels}-{side}x{side}",
        make=make(batch, channels, side, side),
        small=make(1, 4, 9, 9),
        ours=attend_with_large_kernel,
        peers={
            CHAIN: Peer(plain(chain), tolerance=5e-2),
            "the same, channels-last": Peer(channels_last, tolerance=5e-2),
            **({"the same, torch.compile": Peer(compiled, tolerance=5e-2)} if (batch, channels) == (1, 64) else {}),
        },
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
        flops=flops,
        dtypes=(torch.float32, torch.bfloat16) if (batch, channels) == (1, 64) else (torch.float32,),
        goals=(Goal("ratio", 1.5, peer=CHAIN, dtype=torch.float32),) if (batch, channels) == (1, 64) else (),
        memory=(batch, channels) == (1, 64),
    )
    for batch, channels, side in ((1, 64, 56), (8, 64, 56), (1, 32, 56), (1, 128, 28), (1, 320, 14), (1, 512, 7))
]
