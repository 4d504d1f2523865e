"""sparse_encoding: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_choice, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.sparse_rows import scattered_rows
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.sparse_decoding.op import decode_sparsely
from planmill.kernels.routing.sparse_encoding.cases import cases, compare
from planmill.kernels.routing.sparse_encoding.reference import MODES, sparse_encoding_reference

MAX_K = 1024


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradients of x, weight and bias through the latents that were chosen; that of the threshold is zero."""
    x, weight, bias, threshold, _, _ = args
    indices = outputs[1]
    gradient = torch.where(indices >= 0, grads[0], 0).float()
    for_x = decode_sparsely(gradient, indices, weight)
    for_weight = scattered_rows(x, gradient, indices, weight.shape[0])
    for_bias = torch.zeros_like(bias)
    if bias.shape[0]:
        ones = torch.ones_like(x[:, :1], dtype=torch.float32)
        for_bias = scattered_rows(ones, gradient, indices, bias.shape[0])[:, 0]
    return for_x, for_weight.to(weight.dtype), for_bias.to(bias.dtype), torch.zeros_like(threshold), None, None


SPEC = OpSpec(
    schema="sparse_encoding(Tensor x, Tensor weight, Tensor bias, Tensor threshold, int k, str mode) "
    "-> (Tensor, Tensor, Tensor)",
    outputs=lambda x, weight, bias, threshold, k, mode: [
        ((x.shape[0], k), torch.float32),
        ((x.shape[0], k), torch.int32),
        ((x.shape[0],), torch.int32),
    ],
    reference=sparse_encoding_reference,
    cases=cases,
    # of |x||w|; the inputs are taken as they are and sums are float32, whatever their dtype
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-6, 1e-6)),
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def encode_sparsely(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    *,
    mode: str = "topk",
    threshold: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest active latents of each token, found exactly and without the tokens x latents matrix.

    With h = x @ weight.T + bias, latent m of a token is active where

        "topk"       h > 0                                       (ReLU first, then the k largest)
        "abs_topk"   h != 0, and |h| decides; values keep their sign
        "jump_relu"  h > 0 and h >= threshold[m]                 (zero thresholds are ReLU)

    On the CPU all latents are screened in 16-bit arithmetic under a proven error bound, and those that could be among
    the k largest, or about which a threshold is undecided, are evaluated again in float32: the result is that of
    float32 arithmetic, and a token's does not depend on which others share the batch. The gradient of the values
    reaches x, weight and bias through the chosen latents; that of the threshold is zero.

    Args:
        x: [T, D], float32, bfloat16 or float16, any strides.
        weight: [M, D], dtype and device of `x`. Read without a copy where contiguous.
        bias: [M], dtype of `x`, or None.
        k: how many latents are returned at most, 1 to 1024.
        mode: see above.
        threshold: [M], dtype of `x`; of "jump_relu" only, and needed there.

    Returns:
        values: [T, k] float32, largest first, with "abs_topk" by magnitude; 0 where fewer than k latents are active.
        indices: [T, k] int32, -1 where fewer than k are active; of equal values the lower index comes first.
        counts: [T] int32: active latents kept, or with "jump_relu" all active latents, of which the k largest were
            returned: where counts > k, some are missing.
        A NaN score is not active. A token all of whose scores are NaN gets NaN values at indices 0 to k - 1, so that
        what is decoded from them is NaN too, and count 0.

    Raises:
        ValueError: wrong rank, shapes that do not fit together, tensors on different devices, k outside 1 to 1024, an
            unknown mode, a threshold that is missing or not used.
        TypeError: another dtype, or dtypes that differ.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (TopK); Rajamanoharan et al. 2024, "Jumping
    ahead" (JumpReLU; equality with the threshold is on here, as in public code). The papers leave ties, NaN and fewer
    than k active latents open.
    """
    op = "sparse_encoding"
    check_rank(op, "x", x, 2, "[T, D]")
    check_rank(op, "weight", weight, 2, "[M, D]")
    check_float(op, "x", x)
    check_alike(op, "weight", weight, "x", x)
    rows, width = weight.shape
    if x.shape[1] != width or width == 0:
        raise ValueError(f"{op}: weight must be [M, {x.shape[1]}] like x, with D >= 1, got {list(weight.shape)}")
    check_choice(op, "mode", mode, MODES)
    if not 1 <= k <= MAX_K:
        raise ValueError(f"{op}: k must be from 1 to {MAX_K}, got {k}")
    if (threshold is not None) != (mode == "jump_relu"):
        raise ValueError(f"{op}: threshold belongs to mode jump_relu, got {mode} and {_shape_of(threshold)}")
    check_int32_range(op, "weight", rows)
    vectors = []
    for name, vector in (("bias", bias), ("threshold", threshold)):
        if vector is not None:
            check_alike(op, name, vector, "x", x)
            if vector.dim() != 1 or vector.shape[0] != rows:
                raise ValueError(f"{op}: {name} must be [{rows}] like the rows of weight, got {list(vector.shape)}")
        vectors.append(x.new_empty(0) if vector is None else vector)
    return (_op if is_compiling() else _call)(x, weight, *vectors, k, mode)


def _shape_of(threshold: torch.Tensor | None) -> str:
    return "no threshold" if threshold is None else f"a threshold {list(threshold.shape)}"
