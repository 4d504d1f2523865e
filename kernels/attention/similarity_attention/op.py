"""similarity_attention: schema, shape rule, checks and the public function."""

import math

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.similarity_attention.cases import cases, compare
from planmill.kernels.attention.similarity_attention.reference import similarity_attention_reference
from planmill.kernels.common.checks import check_alike, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="similarity_attention(Tensor features, Tensor values, float beta, float gamma, bool batch_coupled) "
    "-> Tensor",
    outputs=lambda features, values, beta, gamma, batch_coupled: [(values.shape, values.dtype)],
    reference=similarity_attention_reference,
    cases=cases,
    tolerances={torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)},
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def attend_by_similarity(
    features: torch.Tensor, values: torch.Tensor, *, beta: float = 1.2, gamma: float = 3.0, batch_coupled: bool = False
) -> torch.Tensor:
    """Values mixed by the similarity of the features of the same places: one attention for values of all heads.

    f_i = F_i / max(|F_i|, 1e-12);  S = gamma (f f^T - beta mean(f f^T)), below 0: -inf;  out = softmax(S) values

    The mean over all pairs is |mean over i of f_i|^2, and no M x M map is written: memory grows as M.

    Args:
        features: [B, M, D], float16, bfloat16 or float32, any strides; D at least 1.
        values: [B, M, C], as features: the values of all heads behind one another, since S is the same for each.
        beta: share of the mean similarity that a pair must reach; published 1.2, and 1.08 for features of SAM.
        gamma: sharpness, above 0.
        batch_coupled: take the mean over the pairs of the whole batch, as in the published code: a sample's result then
            depends on the others. By default each sample has its own mean.

    Returns:
        [B, M, C], dtype of values. A row with no pair left, which the published code turns into NaN (it comes up where
        the mean similarity is above 1 / beta, and for a zero feature), takes its own value. NaN or infinity in a
        feature makes its sample NaN, with `batch_coupled` the whole batch; in a value, its channel of the sample.
        A pair whose S is within rounding (1e-6) of 0 may count or not.

    Raises:
        ValueError: wrong rank or shape, gamma that is not above 0, beta that is not finite, another device.
        TypeError: another dtype.

    Source: Salehi et al., "Crane: context-guided prompt learning and attention refinement for zero-shot anomaly
    detection" (2025), D-Attn; the mean of one sample and the fallback are our choice.
    """
    op = "similarity_attention"
    check_rank(op, "features", features, 3, "[B, M, D]")
    check_rank(op, "values", values, 3, "[B, M, C]")
    check_float(op, "features", features)
    check_alike(op, "values", values, "features", features)
    if features.shape[2] == 0:
        raise ValueError(f"{op}: features must be [B, M, D] with D at least 1, got {list(features.shape)}")
    if values.shape[:2] != features.shape[:2]:
        raise ValueError(f"{op}: values must be {[*features.shape[:2], 'C']} like features, got {list(values.shape)}")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"{op}: gamma must be above 0 and finite, got {gamma}")
    if not math.isfinite(beta):
        raise ValueError(f"{op}: beta must be finite, got {beta}")
    return (_op if is_compiling() else _call)(features, values, beta, gamma, batch_coupled)
