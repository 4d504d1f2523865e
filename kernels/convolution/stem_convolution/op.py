"""stem_convolution: schema, shape rule, checks and the public function."""

from typing import Any

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_device, check_dtype, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec, Shapes
from planmill.kernels.convolution.stem_convolution.cases import cases, compare
from planmill.kernels.convolution.stem_convolution.packing import PANEL
from planmill.kernels.convolution.stem_convolution.reference import stem_convolution_reference

ACTIVATIONS = ("none", "relu")
POOLINGS = ("none", "max", "average")


def _side(n: Any, size: int, stride: int, padding: int) -> Any:
    return (n + 2 * padding - size) // stride + 1


def _outputs(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, *settings: Any) -> Shapes:
    stride, padding, _, _, pool_size, pool_stride, pool_padding, _ = settings
    sides = (
        _side(_side(n, size, stride, padding), pool_size, pool_stride, pool_padding)
        for n, size in ((x.shape[axis], packed.shape[axis]) for axis in (2, 3))  # no slice: the rank may be unknown
    )
    return [((x.shape[0], *sides, bias.shape[0]), x.dtype)]


SPEC = OpSpec(
    schema="stem_convolution(Tensor x, Tensor packed, Tensor bias, int stride, int padding, str activation, "
    "str pooling, int pool_size, int pool_stride, int pool_padding, bool count_include_pad) -> Tensor",
    outputs=_outputs,
    reference=stem_convolution_reference,
    cases=cases,
    tolerances={torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 8e-3), torch.float16: (1e-6, 1e-3)},
    cpu="C++",
    compare=compare,
)
_op, _call = register(SPEC)


def convolve_and_pool(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    activation: str = "none",
    pooling: str = "none",
    pool_size: int = 1,
    pool_stride: int | None = None,
    pool_padding: int = 0,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """A convolution of an image of few channels, its activation and its pooling, of which only the last is written.

        y = pool(act(W * x + b))

    The first layer of a network makes many channels out of three: its result is the largest tensor there is, and is
    read once, to be pooled. Here each row of it is pooled while it is in the cache. Every output is summed in float32
    in the order of channels and taps, beginning with the bias, so that an image has the same bits in every batch.
    Computed in float32, whatever the dtype of x, and rounded once. Made for CPUs: on other devices the op is its
    reference.

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16, any strides: no layout is copied.
        packed: `pack_kernel(weight)`, [P, C, r, s, 16], float32.
        bias: [K], float32; zeros where there is none.
        stride: of the convolution, in both directions.
        padding: zeros on every side.
        activation: "none" or "relu".
        pooling: "none", "max" or "average".
        pool_size: the side of a window.
        pool_stride: between windows; `pool_size` where it is None.
        pool_padding: on every side, at most half a window: zeros for an average, nothing for a maximum.
        count_include_pad: whether an average counts those zeros.

    Returns:
        [B, K, H', W'] of the dtype of x, channels-last: H' = (h + 2 pool_padding - pool_size) // pool_stride + 1 where
        h = (H + 2 padding - r) // stride + 1. NaN and infinity as in PyTorch: a window with a NaN is NaN.

    Raises:
        ValueError: wrong rank or shape, a setting out of range or of a pooling that there is none of, an output without
            pixels, another device.
        TypeError: another dtype.

    Source: the layer is that of He et al., "Deep residual learning" (CVPR 2016), table 1, and of Batzner et al.,
        "EfficientAD" (WACV 2024), table 5; panels as in Goto and van de Geijn (ACM TOMS 2008), section 5.
    """
    op = "stem_convolution"
    check_rank(op, "x", x, 4, "[B, C, H, W]")
    check_float(op, "x", x)
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"{op}: x must have a channel, got {list(x.shape)}")
    if packed.dim() != 5 or packed.shape[1] != channels or packed.shape[4] != PANEL or 0 in packed.shape:
        raise ValueError(
            f"{op}: packed must be [P, {channels}, r, s, 16] for x {list(x.shape)}, got {list(packed.shape)}"
        )
    if bias.dim() != 1 or -(-bias.shape[0] // PANEL) != packed.shape[0]:
        raise ValueError(
            f"{op}: bias must be [K], K channels of {packed.shape[0]} panels of 16, got {list(bias.shape)}"
        )
    for name, tensor in (("packed", packed), ("bias", bias)):
        check_dtype(op, name, tensor, torch.float32)
        check_device(op, name, tensor, "x", x)
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "pooling", pooling, POOLINGS)
    step = pool_size if pool_stride is None else pool_stride
    _check_settings(op, stride, padding, pooling, pool_size, step, pool_padding)
    for n, size in zip(x.shape[2:], packed.shape[2:4], strict=True):
        if n + 2 * padding < size or (n + 2 * padding - size) // stride + 1 + 2 * pool_padding < pool_size:
            raise ValueError(f"{op}: x must give a pixel at least, got {list(x.shape)} under {list(packed.shape)}")
    settings = (stride, padding, activation, pooling, pool_size, step, pool_padding, count_include_pad)
    return (_op if is_compiling() else _call)(x, packed, bias, *settings).permute(0, 3, 1, 2)


def _check_settings(op: str, stride: int, padding: int, pooling: str, size: int, step: int, pad: int) -> None:
    for name, value in (("stride", stride), ("pool_size", size), ("pool_stride", step)):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    if padding < 0:
        raise ValueError(f"{op}: padding must not be negative, got {padding}")
    if not 0 <= 2 * pad <= size:
        raise ValueError(f"{op}: pool_padding must be from 0 to half of pool_size {size}, got {pad}")
    if pooling == "none" and (size, step, pad) != (1, 1, 0):
        raise ValueError(f"{op}: without pooling its size and stride must be 1, its padding 0, got {(size, step, pad)}")
