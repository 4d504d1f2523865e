"""head_covariance: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_device, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.moments.head_covariance.cases import cases
from planmill.kernels.moments.head_covariance.reference import (
    CENTERINGS,
    PAIRINGS,
    head_covariance_reference,
    pair_heads,
)

SPEC = OpSpec(
    schema="head_covariance(Tensor x, Tensor weight, Tensor bias, int heads, float eps, str centering, str pairing, "
    "bool interleaved, bool normalize) -> Tensor",
    outputs=lambda x, weight, bias, heads, eps, centering, pairing, interleaved, normalize: [
        ((x.shape[0], len(pair_heads(heads, pairing)), x.shape[2] // heads, x.shape[2] // heads), torch.float32)
    ],
    reference=head_covariance_reference,
    portable="portable:head_covariance_portable",
    cases=cases,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-5, 1e-5)),
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def cross_covariance(
    x: torch.Tensor,
    heads: int,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    centering: str = "scalar",
    pairing: str = "adjacent",
    interleaved: bool = False,
    normalize: bool = True,
) -> torch.Tensor:
    """How the channels of one group vary with those of another over the tokens: multi-head cross-covariance.

    With X_q [T, d] the channels of head q, after a LayerNorm over them (the same for every head) if its weights are
    given, and less a centre:

        C_ij = X_i^T X_j / T, and then each column divided by max(its length, 1e-12)

    for the pairs of heads (i, j). Normalising, centring and products are one pass over the tokens: no head is copied.

    Args:
        x: [B, T, heads * d], float32, bfloat16 or float16, any strides.
        heads: at least 1.
        norm_weight, norm_bias: [d], any float dtype, of the LayerNorm; both or neither.
        norm_eps: inside its root.
        centering: what is taken from X_q: "scalar", one mean per image and head, over tokens and channels, as in the
            published code; "channel", the mean over the tokens of each channel, as in a covariance; or "none".
        pairing: "adjacent", (q, q + 1); "first", (0, q); "halves", (q, q + heads // 2); "all", i < j.
        interleaved: head q takes the channels q, q + heads, ..., as the published heads on convolutional features do;
            otherwise d neighbours.
        normalize: divide the columns by their lengths.

    Returns:
        [B, P, d, d] float32 of the P pairs, in order; everything is float32 at least. No tokens give zeros. A NaN in x
        reaches the matrices of its head as it does through the formula, and no other image.

    Raises:
        ValueError: wrong rank or shape, `heads` that does not divide the channels, an unknown choice, another device,
            one of `norm_weight` and `norm_bias` without the other.
        TypeError: another dtype.

    Source: Gao et al., "Tuning pre-trained model via moment probing" (ICCV 2023), section 3.2; the scalar centre, the
        order of the heads and the lengths as in the published code.
    """
    op = "head_covariance"
    check_rank(op, "x", x, 3, "[B, T, heads * d]")
    check_float(op, "x", x)
    check_choice(op, "centering", centering, CENTERINGS)
    check_choice(op, "pairing", pairing, PAIRINGS)
    if heads < 1 or x.shape[2] < heads or x.shape[2] % heads:
        raise ValueError(f"{op}: heads must divide the {x.shape[2]} channels of x, got {heads}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError(f"{op}: norm_weight and norm_bias must come together")
    d = x.shape[2] // heads
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (d,):
            raise ValueError(f"{op}: {name} must be [{d}], got {list(tensor.shape)}")
        check_float(op, name, tensor)
        check_device(op, name, tensor, "x", x)
    nothing = x.new_empty(0, dtype=torch.float32)
    weight = nothing if norm_weight is None else norm_weight.float()
    bias = nothing if norm_bias is None else norm_bias.float()
    return (_op if is_compiling() else _call)(
        x, weight, bias, heads, norm_eps, centering, pairing, interleaved, normalize
    )
