"""winograd_convolution: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec, Shapes
from planmill.kernels.convolution.winograd_convolution.cases import cases, compare
from planmill.kernels.convolution.winograd_convolution.reference import winograd_convolution_reference
from planmill.kernels.convolution.winograd_convolution.transform import PANEL, SIDE, SIZES


def _outputs(x: torch.Tensor, transformed: torch.Tensor, bias: torch.Tensor, size: int, padding: int) -> Shapes:
    grown = 2 * padding - size + 1
    return [((x.shape[0], x.shape[1] + grown, x.shape[2] + grown, bias.shape[0]), x.dtype)]


SPEC = OpSpec(
    schema="winograd_convolution(Tensor x, Tensor transformed, Tensor bias, int size, int padding) -> Tensor",
    outputs=_outputs,
    reference=winograd_convolution_reference,
    cases=cases,
    tolerances={torch.float32: (4e-6, 1e-6), torch.bfloat16: (4e-6, 8e-3), torch.float16: (4e-6, 1e-3)},
    cpu="C++",
    compare=compare,
)
_op, _call = register(SPEC)


def convolve_with_winograd(
    x: torch.Tensor, transformed: torch.Tensor, bias: torch.Tensor, *, size: int, padding: int = 0
) -> torch.Tensor:
    """A dense 2-d convolution of stride one with a quarter of its multiplications.

        Y = A^T [sum over c of U_c * (B^T d_c B)] A

    d_c is a tile of 6 x 6 of channel c, padded with zeros; B^T, A^T and G (in U = G g G^T, `transform_weight`) evaluate
    and interpolate polynomials at 0, 1, -1, 1/2, -2 and infinity; a tile gives (7 - r)^2 outputs for 36 products, where
    the sum over taps takes r^2 (7 - r)^2: 2.8 times as many for r = 2 and 5, 4 times for 3 and 4. With these points the
    error in float32 is about that of the plain sum, term after term (a library that sums in blocks can be six times as
    exact); it is bounded by the largest inputs of the tile, not by the output.
    Computed in float32, whatever the dtype of x, and rounded once. Made for CPUs without matrix units: on other devices
    the op is its reference.

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16, any strides; channels-last is not copied.
        transformed: `transform_weight(weight)`, [36, P, C, 16], float32.
        bias: [K], float32; zeros where there is none.
        size: r, the taps of a side, 2 to 5.
        padding: zeros on every side.

    Returns:
        [B, K, H + 2 padding - r + 1, W + 2 padding - r + 1] of the dtype of x, channels-last. What sees a NaN or an
        infinity is not finite, and other outputs of its tile need not be. Samples of a batch do not depend on each
        other.

    Raises:
        ValueError: wrong rank or shape, a size or padding out of range, an output without pixels, another device.
        TypeError: another dtype.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016), section 4; the points:
        Barabasz, Anderson, Soodhalter and Gregg, "Error analysis and improving the accuracy of Winograd convolution for
        deep neural networks" (ACM TOMS 2020).
    """
    op = "winograd_convolution"
    check_rank(op, "x", x, 4, "[B, C, H, W]")
    check_float(op, "x", x)
    if size not in SIZES:
        raise ValueError(f"{op}: size must be from 2 to 5, got {size}")
    if padding < 0:
        raise ValueError(f"{op}: padding must not be negative, got {padding}")
    if (
        transformed.dim() != 4
        or tuple(transformed.shape[::2]) != (SIDE * SIDE, x.shape[1])
        or transformed.shape[3] != PANEL
    ):
        raise ValueError(
            f"{op}: transformed must be [36, P, {x.shape[1]}, 16] for x {list(x.shape)}, got {list(transformed.shape)}"
        )
    panels = transformed.shape[1]
    if bias.dim() != 1 or -(-bias.shape[0] // PANEL) != panels:
        raise ValueError(f"{op}: bias must be [K], K channels of {panels} panels of 16, got {list(bias.shape)}")
    for name, tensor in (("transformed", transformed), ("bias", bias)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}")
    if min(x.shape[2:]) + 2 * padding < size:
        raise ValueError(
            f"{op}: x with its padding must be {size} x {size} at least, got {list(x.shape)}, padding {padding}"
        )
    last = x.permute(0, 2, 3, 1).contiguous()
    return (_op if is_compiling() else _call)(last, transformed, bias, size, padding).permute(0, 3, 1, 2)
