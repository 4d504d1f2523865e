"""covariance: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.moments.covariance.cases import cases, compare
from planmill.kernels.moments.covariance.reference import covariance_reference
from planmill.kernels.moments.covariance.result import CovarianceMoments

SPEC = OpSpec(
    schema="covariance(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=lambda x: [
        ((x.shape[0], x.shape[2]), torch.float32),
        ((x.shape[0], x.shape[2]), torch.float32),
        ((x.shape[0], x.shape[2], x.shape[2]), torch.float32),
        ((x.shape[0], x.shape[2]), torch.float32),
        ((x.shape[0],), torch.float32),
    ],
    reference=covariance_reference,
    cases=cases,
    compare=compare,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.0, 2e-6)),
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def covariance_moments(x: torch.Tensor, *, correction: int = 1) -> CovarianceMoments:
    """Count, mean and covariance of rows, in one pass over them.

    covariance = sum_i (x_i - mean)(x_i - mean)^T / (N - correction). Rows are taken relative to a pivot near their
    mean, and what the pivot is off is taken out in float64: a mean far from zero costs no accuracy, as it does with
    E[x x^T] - mean mean^T. Only one triangle is computed.

    Args:
        x: [N, d], one set of N rows, or [B, N, d], B sets; float32, bfloat16 or float16, any strides.
        correction: the divisor is N - correction: 1 for the unbiased estimate, 0 for that of the maximum likelihood.

    Returns:
        A CovarianceMoments. Sums are float32 over at most 2048 rows (128 in registers, then 16 such sums) and float64
        beyond, whatever the dtype of `x`. They are the same for every number of threads.

    Raises:
        ValueError: wrong rank, no more rows than `correction`; outside torch.compile also NaN or infinity in `x`: the
            message names the first such row. On a GPU that check waits for the result.
        TypeError: another dtype.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), for shifted data and merging.
    """
    op = "covariance"
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x must be [N, d] or [B, N, d], got {list(x.shape)}")
    check_float(op, "x", x)
    count = x.shape[-2]
    if correction < 0 or count <= correction:
        raise ValueError(f"{op}: x must have more than {max(correction, 0)} rows, got {count}")
    mean, _, scatter, _, _ = compute_moments(x if x.dim() == 3 else x[None])
    covariance = scatter / (count - correction)
    return CovarianceMoments(count, *((mean, covariance) if x.dim() == 3 else (mean[0], covariance[0])))


def compute_moments(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The op on [B, N, d]; outside torch.compile, ValueError names a row with NaN or infinity."""
    if is_compiling():
        return _op(x)
    moments = _call(x)
    if not bool(moments[0].isfinite().all()):
        bad = (~x.isfinite().all(2)).nonzero()
        if len(bad):
            s, row = bad[0].tolist()
            of_set = f" of set {s}" if len(x) > 1 else ""
            raise ValueError(f"covariance: x holds NaN or infinity in row {row}{of_set}")
    return moments
