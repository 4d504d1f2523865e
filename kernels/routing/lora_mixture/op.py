"""lora_mixture: schema, shape rule, checks and the public function."""

import math

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.lora_mixture.cases import cases, compare
from planmill.kernels.routing.lora_mixture.gradient import backward
from planmill.kernels.routing.lora_mixture.reference import lora_mixture_reference

MAX_RANKS = 64

SPEC = OpSpec(
    schema="lora_mixture(Tensor x, Tensor weight, Tensor bias, Tensor down, Tensor up, Tensor omega, float scale) "
    "-> Tensor",
    outputs=lambda x, weight, bias, down, up, omega, scale: [((x.shape[0], x.shape[1], weight.shape[0]), x.dtype)],
    reference=lora_mixture_reference,
    cases=cases,
    compare=compare,
    # In 16 bits the scaled product with `down` may be rounded before the product with `up`: tensor cores.
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 8e-3), torch.float16: (1e-3, 1e-3)},
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def mix_adapters(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    omega: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """A linear layer with n low-rank adapters, mixed by weights of each sample.

        y = x weight^T + bias + scale * sum over i of omega[b, i] * (x down[i]^T) up[i]

    Products with `down` stay float32 until they are scaled. Weights are used as they are: they need not sum to one, nor
    lie in [0, 1].

    Args:
        x: [M, ..., I], float32, bfloat16 or float16, any strides. M is a multiple of B: row m belongs to sample
            m // (M / B), so that windows of an image, one after the other, share its weights.
        weight: [O, I], dtype of `x`.
        bias: [O], dtype of `x`, or None.
        down: [n, r, I], dtype of `x`: the adapters' first matrices.
        up: [n, r, O], dtype of `x`: their second matrices, transposed; n * r at most 64.
        omega: [B, n] float32.
        scale: sc.

    Returns:
        [M, ..., O], dtype of `x`. A NaN in a token makes that token's result NaN and touches no other.

    Raises:
        ValueError: wrong rank, shapes that do not fit together, n * r above 64, tensors on different devices.
        TypeError: another dtype.

    Source: PETALface (Narayan et al., WACV 2025) and its public code: two adapters with omega = (1 - alpha, alpha),
    alpha from the quality of the image and not clamped; the form with n adapters is the same sum.
    """
    op = "lora_mixture"
    check_float(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [M, ..., I], got {list(x.shape)}")
    for name, tensor, rank, layout in (
        ("weight", weight, 2, "[O, I]"), ("down", down, 3, "[n, r, I]"), ("up", up, 3, "[n, r, O]"),
    ):  # fmt: skip
        check_rank(op, name, tensor, rank, layout)
        check_alike(op, name, tensor, "x", x)
    check_rank(op, "omega", omega, 2, "[B, n]")
    if omega.dtype is not torch.float32:
        raise TypeError(f"{op}: omega must be torch.float32, got {omega.dtype}")
    if omega.device != x.device:
        raise ValueError(f"{op}: omega must be on {x.device} like x, got {omega.device}")
    (n, ranks, inputs), outputs, batch = down.shape, weight.shape[0], omega.shape[0]
    if inputs != x.shape[-1] or weight.shape[1] != inputs:
        widths = [x.shape[-1], weight.shape[1], inputs]
        raise ValueError(f"{op}: x, weight and down must have one width I, got {widths}")
    if tuple(up.shape) != (n, ranks, outputs):
        raise ValueError(f"{op}: up must be {[n, ranks, outputs]} to fit down and weight, got {list(up.shape)}")
    if n * ranks > MAX_RANKS:
        raise ValueError(f"{op}: n * r must be at most {MAX_RANKS}, got {n} * {ranks}")
    if omega.shape[1] != n:
        raise ValueError(f"{op}: omega must be [B, {n}] with the n of down, got {list(omega.shape)}")
    if bias is not None:
        check_alike(op, "bias", bias, "x", x)
        if bias.shape != (outputs,):
            raise ValueError(f"{op}: bias must be [{outputs}] like the rows of weight, got {list(bias.shape)}")
    if (batch == 0 and x.shape[0] != 0) or (batch != 0 and x.shape[0] % batch != 0):
        raise ValueError(f"{op}: x must have a multiple of B = {batch} rows, B of omega, got {x.shape[0]}")
    tokens = math.prod(x.shape[1:-1])
    rows = x.reshape(batch, x.shape[0] // max(batch, 1) * tokens, inputs)
    run = _op if is_compiling() else _call
    y = run(rows, weight, x.new_empty(0) if bias is None else bias, down, up, omega, scale)
    return y.view(*x.shape[:-1], outputs)
