"""mahalanobis: schema, shape rule, checks and the public functions."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.moments.mahalanobis.cases import cases
from planmill.kernels.moments.mahalanobis.reference import mahalanobis_reference

SPEC = OpSpec(
    schema="mahalanobis(Tensor x, Tensor mean, Tensor factor) -> Tensor",
    outputs=lambda x, mean, factor: [((x.shape[0], x.shape[1]), torch.float32)],
    reference=mahalanobis_reference,
    portable="portable:mahalanobis_portable",
    cases=cases,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (2e-5, 2e-5)),
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def measure_mahalanobis(x: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Mahalanobis distance of feature vectors from one Gaussian, or from one for each position.

    D = sqrt((x - mu)^T S^-1 (x - mu)) = |G (x - mu)| with S = L L^T and G = L^-1: never negative under the root, better
    conditioned than S^-1, and half its size.

    Args:
        x: [B, P, d] with one Gaussian for each of P positions, or [N, d] with one for all; float32, bfloat16 or
            float16, any strides.
        mean: [P, d], or [d] with x [N, d]; float32.
        factor: [P, d (d + 1) / 2], or [d (d + 1) / 2]: the lower triangle of G row by row, as `factor_covariance` gives
            it; float32, or bfloat16: half the bytes, which is what bounds a batch of one.

    Returns:
        [B, P] or [N], float32; sums are float32 at least. NaN where x holds NaN or infinity.

    Raises:
        ValueError: wrong ranks or sizes that do not fit together.
        TypeError: another dtype.

    Source: Defard et al., "PaDiM" (ICPR 2021), section 3.2; Rippel et al., "Modeling the distribution of normal data in
        pre-trained deep features for anomaly detection" (ICPR 2020), section 3.
    """
    op = "mahalanobis"
    if x.dim() == 2 and mean.dim() == 1 and factor.dim() == 1:
        return measure_mahalanobis(x[:, None], mean[None], factor[None])[:, 0]
    check_rank(op, "x", x, 3, "[B, P, d], or [N, d] with one Gaussian for all")
    check_float(op, "x", x)
    if mean.dtype is not torch.float32:
        raise TypeError(f"{op}: mean must be float32, got {mean.dtype}")
    if factor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: factor must be float32 or bfloat16, got {factor.dtype}")
    positions, d = x.shape[1:]
    for name, tensor, shape in (("mean", mean, (positions, d)), ("factor", factor, (positions, d * (d + 1) // 2))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}")
    return (_op if is_compiling() else _call)(x, mean, factor)


def factor_covariance(covariance: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The packed triangle of G = L^-1, S = L L^T, that `measure_mahalanobis` takes.

    Args:
        covariance: [d, d] or [P, d, d], symmetric and positive definite, any float dtype; factored in float64.
        dtype: float32 or bfloat16, of the result.

    Returns:
        [d (d + 1) / 2] or [P, d (d + 1) / 2].

    Raises:
        ValueError: no square matrices.
        torch.linalg.LinAlgError: a covariance is singular; the message names its position and the remedy.

    Source: Golub and Van Loan, "Matrix computations", section 4.2.
    """
    op = "mahalanobis"
    if covariance.dim() not in (2, 3) or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"{op}: covariance must be [d, d] or [P, d, d], got {list(covariance.shape)}")
    d = covariance.shape[-1]
    rows, columns = torch.tril_indices(d, d, device=covariance.device).unbind()
    matrices = covariance if covariance.dim() == 3 else covariance[None]
    packed = torch.empty(len(matrices), d * (d + 1) // 2, dtype=dtype, device=covariance.device)
    step = max(1, (1 << 25) // max(1, d * d))  # positions factored at a time: 256 MB
    for first in range(0, len(matrices), step):
        lower, info = torch.linalg.cholesky_ex(matrices[first : first + step].double())
        if bool(info.any()):
            position = first + int(info.nonzero()[0])
            where = f" of position {position}" if covariance.dim() == 3 else ""
            raise torch.linalg.LinAlgError(
                f"{op}: the covariance{where} is singular; shrink it (shrink_ledoit_wolf), or add a multiple of the "
                "identity (PaDiM adds 0.01)"
            )
        identity = torch.eye(d, dtype=torch.float64, device=covariance.device)
        g = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        packed[first : first + step] = g[:, rows, columns].to(dtype)
    return packed if covariance.dim() == 3 else packed[0]
