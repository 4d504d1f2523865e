"""large_kernel_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.large_kernel_attention.cases import cases, compare
from planmill.kernels.attention.large_kernel_attention.reference import large_kernel_attention_reference
from planmill.kernels.common.checks import check_alike, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="large_kernel_attention(Tensor x, Tensor weight5, Tensor bias5, Tensor weight7, Tensor bias7, "
    "Tensor weight_point, Tensor bias_point) -> Tensor",
    outputs=lambda x, *rest: [(x.shape, x.dtype)],
    reference=large_kernel_attention_reference,
    cases=cases,
    tolerances={torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-3, 1e-3)},
    cpu="C++",
    cuda="_triton:launch",
    compare=compare,
)
_op, _call = register(SPEC)


def attend_with_large_kernel(
    x: torch.Tensor,
    weight5: torch.Tensor,
    bias5: torch.Tensor,
    weight7: torch.Tensor,
    bias7: torch.Tensor,
    weight_point: torch.Tensor,
    bias_point: torch.Tensor,
) -> torch.Tensor:
    """The input times an attention map of a large kernel, taken apart into three convolutions.

        y = x * (W t + b),    t = DW7(DW5(x))

    DW5 is depthwise, 5 x 5; DW7 is depthwise, 7 x 7 with dilation 3, so that together they see 23 x 23 positions; W is
    1 x 1. Each has a bias, and its own border of zeros: the two are not one convolution with a 23 x 23 kernel, since
    what DW5 would give outside of the image counts as zero. Sums and the last product are float32, rounded once; 16-bit
    input too is computed in float32 vectors on the CPU.

    Args:
        x: [B, C, H, W], float16, bfloat16 or float32, any strides; what is not contiguous is copied.
        weight5, bias5: [C, 1, 5, 5] and [C], like x.
        weight7, bias7: [C, 1, 7, 7] and [C], like x.
        weight_point, bias_point: [C, C, 1, 1] and [C], like x.

    Returns:
        [B, C, H, W] of the dtype of x, contiguous. A NaN reaches the positions that see its own; samples of a batch do
        not depend on each other.

    Raises:
        ValueError: wrong rank or shape, another device.
        TypeError: another dtype.

    Source: Guo et al., "Visual attention network" (CVM 2023), section 3.1, and its code.
    """
    op = "large_kernel_attention"
    check_rank(op, "x", x, 4, "[B, C, H, W]")
    check_float(op, "x", x)
    channels = x.shape[1]
    for name, tensor, shape in (
        ("weight5", weight5, (channels, 1, 5, 5)),
        ("bias5", bias5, (channels,)),
        ("weight7", weight7, (channels, 1, 7, 7)),
        ("bias7", bias7, (channels,)),
        ("weight_point", weight_point, (channels, channels, 1, 1)),
        ("bias_point", bias_point, (channels,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")
        check_alike(op, name, tensor, "x", x)
    return (_op if is_compiling() else _call)(x, weight5, bias5, weight7, bias7, weight_point, bias_point)
