"""packed_linear: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_device, check_dtype
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.linear.packed_linear.cases import cases, compare
from planmill.kernels.linear.packed_linear.packing import PANEL
from planmill.kernels.linear.packed_linear.reference import ACTIVATIONS, packed_linear_reference

SPEC = OpSpec(
    schema="packed_linear(Tensor x, Tensor packed, Tensor bias, str activation) -> Tensor",
    outputs=lambda x, packed, bias, activation: [((*x.shape[:-1], bias.shape[0]), x.dtype)],
    reference=packed_linear_reference,
    cases=cases,
    tolerances={torch.float32: (1e-6, 1e-6)},
    cpu="C++",
    compare=compare,
)
_op, _call = register(SPEC)


def apply_packed_weight(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, *, activation: str = "none"
) -> torch.Tensor:
    """A linear layer whose weight was packed beforehand, and the activation behind it.

        y = act(x W^T + b)

    Matrix products of a few hundred rows spend a fifth of their time on bringing the weight into the order in which it
    is read; `pack_weight` does that once. Computed in float32; every sum begins with the bias and runs over the
    channels in order, so that a row has the same bits in every batch. Made for CPUs: on other devices the op is its
    reference.

    Args:
        x: [..., K], float32, any strides.
        packed: `pack_weight(weight)`, [P, K, 16], float32.
        bias: [N], float32; zeros where there is none.
        activation: "none", "gelu" (with erf), "gelu_tanh", "relu" or "silu".

    Returns:
        [..., N], float32. A NaN or an infinity touches the results of its row alone.

    Raises:
        ValueError: wrong rank or shape, an unknown activation, another device.
        TypeError: another dtype.

    Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (ACM TOMS 2008), section 5; GELU:
        Hendrycks and Gimpel (2016). The paper packs both operands at every product; here the rows stay where they are.
    """
    op = "packed_linear"
    for name, tensor in (("x", x), ("packed", packed), ("bias", bias)):
        check_dtype(op, name, tensor, torch.float32)
        check_device(op, name, tensor, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., K], got a scalar")
    channels = x.shape[-1]
    if packed.dim() != 3 or tuple(packed.shape[1:]) != (channels, PANEL):
        raise ValueError(f"{op}: packed must be [P, {channels}, 16] for x {list(x.shape)}, got {list(packed.shape)}")
    if bias.dim() != 1 or -(-bias.shape[0] // PANEL) != packed.shape[0]:
        raise ValueError(
            f"{op}: bias must be [N], N channels of {packed.shape[0]} panels of 16, got {list(bias.shape)}"
        )
    check_choice(op, "activation", activation, tuple(ACTIVATIONS))
    return (_op if is_compiling() else _call)(x, packed, bias, activation)
