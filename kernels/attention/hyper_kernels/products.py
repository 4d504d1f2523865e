"""The three HyperZ.Z.W products as functions. Plain PyTorch: products, batched and shifted."""

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_device, check_float, check_rank


def _check(op: str, z: torch.Tensor, **kernels: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    check_rank(op, "z", z, 4, "[B, C, H, W]")
    check_float(op, "z", z)
    for name, (kernel, shape) in kernels.items():
        if kernel.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)} for z {list(z.shape)}, got {list(kernel.shape)}")
        check_device(op, name, kernel, "z", z)


def multiply_with_kernel(z: torch.Tensor, kernel: torch.Tensor, *, twice: bool = True) -> torch.Tensor:
    """The global product of activations with a kernel of their own size: `F[b, c] = (Z[b, c] * K[c]) Z[b, c]`.

    `*` element by element, then a product of S x S matrices, in float32.

    Args:
        z: [B, C, S, S], float16, bfloat16 or float32, any strides.
        kernel: [C, S, S], any float dtype.
        twice: False: `K[c] Z[b, c]`, without the product with Z before it, as a later revision of public code has it.

    Returns:
        [B, C, S, S] of the dtype of z. Samples do not depend on each other.

    Raises:
        ValueError: wrong rank or shape, H other than W, another device.
        TypeError: z of another dtype.

    Source: HyperZ.Z.W ("Terminator"), its abstract and a third party's copy of the code. That the copy agrees with the
    paper is not verified.
    """
    op = "multiply_with_kernel"
    check_rank(op, "z", z, 4, "[B, C, S, S]")
    if z.shape[2] != z.shape[3]:
        raise ValueError(f"{op}: z must be [B, C, S, S], got {list(z.shape)}")
    _check(op, z, kernel=(kernel, tuple(z.shape[1:])))
    wide, k = z.float(), kernel.float()
    return torch.matmul(wide * k if twice else k, wide).to(z.dtype)


def gate_by_kernels(z: torch.Tensor, channel_kernel: torch.Tensor, position_kernel: torch.Tensor) -> torch.Tensor:
    """The element-wise product ("2E") as a gate: `z * sigmoid(s_c * s_hw)`, with `s = (m * K) * m = m^2 K`.

    m is the mean of a channel over the positions for s_c, and of a position over the channels for s_hw; float32.

    Args:
        z: [B, C, H, W], float16, bfloat16 or float32, any strides.
        channel_kernel: [C], any float dtype.
        position_kernel: [H, W], any float dtype.

    Returns:
        [B, C, H, W] of the dtype of z. Samples do not depend on each other: the published standardisation of the
        scores by batch statistics is left out.

    Raises:
        ValueError: wrong rank or shape, another device.
        TypeError: z of another dtype.

    Source: as in `multiply_with_kernel`; not verified against the paper.
    """
    _check(
        "gate_by_kernels", z, channel_kernel=(channel_kernel, (z.shape[1],) if z.dim() == 4 else ()),
        position_kernel=(position_kernel, tuple(z.shape[2:])),
    )  # fmt: skip
    wide = z.float()
    channel = wide.mean((2, 3)).square() * channel_kernel.float()
    position = wide.mean(1).square() * position_kernel.float()
    return (wide * torch.sigmoid(channel[:, :, None, None] * position[:, None])).to(z.dtype)


def filter_by_sample(z: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution, borders zero, in which every sample has kernels of its own; float32.

    Args:
        z: [B, C, H, W], float16, bfloat16 or float32, any strides.
        kernels: [B, C, k, k], k odd; any float dtype.

    Returns:
        [B, C, H, W] of the dtype of z.

    Raises:
        ValueError: wrong rank or shape, k even, another device.
        TypeError: z of another dtype.

    Source: the local operator of HyperZ.Z.W; see `multiply_with_kernel`.
    """
    op = "filter_by_sample"
    check_rank(op, "kernels", kernels, 4, "[B, C, k, k]")
    k = kernels.shape[3]
    _check(op, z, kernels=(kernels, (*z.shape[:2], k, k)))
    if k % 2 == 0:
        raise ValueError(f"{op}: kernels must be [B, C, k, k] with k odd, got {list(kernels.shape)}")
    height, width = z.shape[2:]
    padded, taps = F.pad(z.float(), (k // 2,) * 4), kernels.float()
    y = torch.zeros_like(z, dtype=torch.float32)
    for i in range(k):  # a convolution with groups = B C would fix the batch of an exported program
        for j in range(k):
            y = torch.addcmul(y, padded[:, :, i : i + height, j : j + width], taps[:, :, i, j, None, None])
    return y.to(z.dtype)
