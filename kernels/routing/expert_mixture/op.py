"""expert_mixture: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_choice, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.expert_mixture.cases import cases, compare
from planmill.kernels.routing.expert_mixture.gradient import backward
from planmill.kernels.routing.expert_mixture.reference import ACTIVATIONS, expert_mixture_reference

SPEC = OpSpec(
    schema="expert_mixture(Tensor x, Tensor indices, Tensor weights, Tensor up, Tensor up_bias, Tensor down, "
    "Tensor down_bias, str activation, bool weight_on_input) -> Tensor",
    outputs=lambda x, indices, weights, up, up_bias, down, down_bias, activation, weight_on_input: [
        ((x.shape[0], down.shape[1]), x.dtype)
    ],
    reference=expert_mixture_reference,
    portable="portable:expert_mixture_portable",
    cases=cases,
    compare=compare,
    # The hidden row may be rounded to 16 bits between the two products, as the tensor cores and AMX take it.
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 8e-3), torch.float16: (2e-3, 2e-3)},
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def mix_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    weight_on_input: bool = False,
) -> torch.Tensor:
    """Each token through the experts it is assigned to; only the assigned experts are computed.

    y[t] = sum_j weights[t, j] * Expert_e(x[t]) with e = indices[t, j], and

        Expert_e(v) = down[e] h + down_bias[e],   h = act(up[e] v + up_bias[e])                       plain, or
                                                  h = act(g) * u, [g; u] = up[e] v + up_bias[e]       gated.

    It is gated where `up` has 2F rows an expert: the gate's F first, then the F it multiplies. Sums are float32, in a
    fixed order: over j in order, and on a CPU a token's result has the same bits whatever other tokens share the batch.
    Tensor cores and AMX take h in the 16-bit dtype of `x`; other processors keep it in float32.

    Args:
        x: [T, D], float32, bfloat16 or float16, any strides.
        indices: [T, k], int32: the expert of each assignment; -1 drops it: it adds nothing. An expert that stands twice
            in a row is two terms. Any other value outside 0..E-1 is a mistake: the CPU raises ValueError; a GPU, which
            cannot without waiting for the device, takes it as -1.
        weights: [T, k], float32: weight of each assignment, used as it is.
        up: [E, F, D], or [E, 2F, D] gated; dtype of `x`. Read without a copy where contiguous, as `down` is.
        down: [E, D_out, F], dtype of `x`.
        up_bias: [E, F], or [E, 2F] gated; dtype of `x`.
        down_bias: [E, D_out], dtype of `x`.
        activation: "silu", "gelu" (with erf), "gelu_tanh" or "relu".
        weight_on_input: the weight multiplies x[t] before the expert instead of the expert's result.

    Returns:
        [T, D_out], dtype of `x`. Zero for a token whose assignments were all dropped. A NaN in a token makes
        that token's result NaN and touches no other.

    Raises:
        ValueError: wrong rank, shapes that do not fit together, an unknown activation, tensors on different devices, an
            index outside -1..E-1 (on the CPU), T * k of 2^31 or more.
        TypeError: another dtype.

    Source: Shazeer et al., ICLR 2017 (sparsely gated mixtures); gated experts: Shazeer 2020 (GLU variants) and Mixtral
    (Jiang et al., 2024), whose fused weights have this layout; weight_on_input: Llama 4. How a token chooses
    its experts, and whether its weights sum to one, is the router's business.
    """
    op = "expert_mixture"
    for name, tensor, rank, layout in (
        ("x", x, 2, "[T, D]"), ("indices", indices, 2, "[T, k]"), ("weights", weights, 2, "[T, k]"),
        ("up", up, 3, "[E, F or 2F, D]"), ("down", down, 3, "[E, D_out, F]"),
    ):  # fmt: skip
        check_rank(op, name, tensor, rank, layout)
    check_float(op, "x", x)
    check_alike(op, "up", up, "x", x)
    check_alike(op, "down", down, "x", x)
    for name, tensor, dtype in (("indices", indices, torch.int32), ("weights", weights, torch.float32)):
        if tensor.dtype is not dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}")
    experts, d_out, f = down.shape
    rows = up.shape[1]
    _check_shape("indices", indices, (x.shape[0], indices.shape[1]), "[T, k] with the T of x")
    _check_shape("weights", weights, indices.shape, "[T, k] like indices")
    if rows not in (f, 2 * f):
        raise ValueError(f"{op}: up must be [E, F or 2F, D] with F = {f} as in down, got {list(up.shape)}")
    _check_shape("up", up, (experts, rows, x.shape[1]), "[E, F or 2F, D] with the E of down and the D of x")
    check_int32_range(op, "indices, flattened,", indices.numel())
    check_choice(op, "activation", activation, tuple(ACTIVATIONS))
    biases = []
    for name, bias, shape in (("up_bias", up_bias, (experts, rows)), ("down_bias", down_bias, (experts, d_out))):
        if bias is not None:
            check_alike(op, name, bias, "x", x)
            _check_shape(name, bias, shape, "one row an expert")
        biases.append(x.new_empty(0) if bias is None else bias)
    run = _op if is_compiling() else _call
    return run(x, indices, weights, up, biases[0], down, biases[1], activation, weight_on_input)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], layout: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"expert_mixture: {name} must be {list(shape)}, {layout}, got {list(tensor.shape)}")
