"""matrix_root: schema, shape rule, checks and the public functions."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_float
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.moments.matrix_root.cases import cases, compare
from planmill.kernels.moments.matrix_root.reference import matrix_root_reference

SPEC = OpSpec(
    schema="matrix_root(Tensor s, int iterations, bool inverse) -> Tensor",
    outputs=lambda s, iterations, inverse: [(s.shape, torch.float32)],
    reference=matrix_root_reference,
    portable="portable:matrix_root_portable",
    cases=cases,
    compare=compare,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (0.0, 1e-5)),
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)

MODES = ("newton", "exact")


def matrix_sqrt(s: torch.Tensor, *, iterations: int = 5, mode: str = "newton", inverse: bool = False) -> torch.Tensor:
    """Square roots of covariance matrices, or their inverses, by the Newton-Schulz iteration of a published length.

    With A = S / tr S, Y_0 = A and Z_0 = I, each step takes M = (3 I - Z Y) / 2, Y <- Y M, Z <- M Z; the result is
    sqrt(tr S) Y_T, or Z_T / sqrt(tr S). Networks are trained with T = 5, where the iteration has not converged (the
    error of the root of a 64 x 64 covariance is then around 20 %): T is part of the model. All iterates are polynomials
    of A: they commute, so that one triangle of each product is computed, and the result is symmetric to the bit. What
    the first and last step do not need is left out: 3 T - 3 products.

    Args:
        s: [B, D, D] or [D, D], float32, bfloat16 or float16, any strides; its symmetric part is taken, which should
            have no negative eigenvalue.
        iterations: T, at least 1; not used by "exact".
        mode: "newton", or "exact": by torch.linalg.eigh in float64, the limit of many iterations.
        inverse: S^(-1/2) instead of S^(1/2).

    Returns:
        float32, the shape of `s`; computed in float32 ("exact": float64). A trace of zero gives zeros, a matrix with
        NaN, infinity or a negative trace gives NaN, and does not touch others of the batch. "exact" takes eigenvalues
        below D 2^-52 of the largest as zero and leaves their directions out of an inverse (the pseudo-inverse);
        "newton" gives them 1.5^T / sqrt(tr S). A converged inverse is as good as float32 allows: eigenvalues below 1e-7
        of the largest are noise.

    Raises:
        ValueError: no square matrices, fewer than one iteration, an unknown mode.
        TypeError: another dtype.

    Source: Li, Xie, Wang, Gao, "Towards faster training of global covariance pooling networks by iterative matrix
        square root normalization" (CVPR 2018), section 3.2, with the trace; Higham, "Functions of matrices" (2008),
        section 6.7. The published code gives Z for Y with T = 1; here it is Y.
    """
    op = "matrix_root"
    if s.dim() not in (2, 3) or s.shape[-1] != s.shape[-2]:
        raise ValueError(f"{op}: s must be [B, D, D] or [D, D], got {list(s.shape)}")
    check_float(op, "s", s)
    check_choice(op, "mode", mode, MODES)
    if iterations < 1:
        raise ValueError(f"{op}: iterations must be at least 1, got {iterations}")
    batch = s if s.dim() == 3 else s[None]
    root = (
        _by_eigenvalues(batch, inverse)
        if mode == "exact"
        else (_op if is_compiling() else _call)(batch, iterations, inverse)
    )
    return root if s.dim() == 3 else root[0]


def _by_eigenvalues(s: torch.Tensor, inverse: bool) -> torch.Tensor:
    s = (s.double() + s.double().mT) / 2
    unknown = ~s.isfinite().all(2).all(1)[:, None, None]
    unknown = unknown | (s.diagonal(dim1=1, dim2=2).sum(1) < 0)[:, None, None]
    values, vectors = torch.linalg.eigh(s.masked_fill(unknown, 0.0))
    least = values[:, -1:] * (s.shape[1] * 2.0**-52) if s.shape[1] > 0 else 0.0
    counted = values > least
    roots = torch.where(counted, values, 1.0).sqrt()
    roots = torch.where(counted, roots.reciprocal() if inverse else roots, 0.0)
    root = (vectors * roots[:, None]) @ vectors.mT
    return ((root + root.mT) / 2).masked_fill(unknown, torch.nan).float()


def whiten(x: torch.Tensor, *, eps: float = 1e-5, iterations: int = 5, mode: str = "newton") -> torch.Tensor:
    """Feature maps with each image's covariance turned into the identity, or near it (ZCA).

    y = S^(-1/2) (x - mean) with S = (x - mean)(x - mean)^T / HW + eps I, mean and S of each image over its positions.

    Args:
        x: [B, C, H, W] or [B, C, HW], float32, bfloat16 or float16, any strides.
        eps: added to the variances.
        iterations, mode: of `matrix_sqrt`. With 5 iterations, the default of what is published, the covariance of y
            is not yet the identity.

    Returns:
        The shape and dtype of `x`; inside everything is float32 at least. A map that is constant in every channel gives
        zeros. No positions give an empty result. NaN or infinity make their own image NaN.

    Raises:
        ValueError: wrong rank; what `matrix_sqrt` raises.
        TypeError: another dtype.

    Source: Huang et al., "Iterative normalization: beyond standardization towards efficient whitening" (CVPR 2019),
        section 3, per image instead of per batch: the instance whitening of Pan et al., "Switchable whitening" (ICCV
        2019).
    """
    check_maps("whiten", x)
    maps = x.flatten(2).float()
    maps = maps - maps[:, :, :1]  # so that a constant channel is exactly zero, and digits of a large mean are not lost
    maps -= maps.mean(2, keepdim=True)
    covariance = torch.bmm(maps, maps.mT) / max(maps.shape[2], 1)
    covariance = covariance + eps * torch.eye(x.shape[1], dtype=torch.float32, device=x.device)
    root = matrix_sqrt(covariance, iterations=iterations, mode=mode, inverse=True)
    return torch.bmm(root, maps).to(x.dtype).view(x.shape)


def pool_covariance(x: torch.Tensor, *, iterations: int = 5, mode: str = "newton") -> torch.Tensor:
    """The square root of each image's channel covariance, as a vector: the head iSQRT-COV.

    The upper triangle, row by row, of (X J X^T)^(1/2) with J = (I - 1 1^T / HW) / HW.

    Args:
        x: [B, D, H, W] or [B, D, HW], float32, bfloat16 or float16, any strides.
        iterations, mode: of `matrix_sqrt`; 5 in the published networks.

    Returns:
        [B, D (D + 1) / 2] float32. A map that is constant in every channel gives zeros (the published code divides by
        its trace, zero, and gives NaN). NaN or infinity make their own image NaN.

    Raises:
        ValueError: wrong rank; what `matrix_sqrt` raises.
        TypeError: another dtype.

    Source: Li, Xie, Wang, Gao, "Towards faster training of global covariance pooling networks by iterative matrix
        square root normalization" (CVPR 2018), section 3.
    """
    check_maps("pool_covariance", x)
    maps = x.flatten(2)
    scatter = torch.ops.planmill.covariance(maps.transpose(1, 2))[2]  # the op: its caller would wait for a GPU
    root = matrix_sqrt(scatter / max(maps.shape[2], 1), iterations=iterations, mode=mode)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device).unbind()
    return root.flatten(1).index_select(1, rows * x.shape[1] + columns)


def check_maps(op: str, x: torch.Tensor) -> None:
    """Raise unless `x` is a batch of feature maps."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [B, C, H, W] or [B, C, HW], got {list(x.shape)}")
    check_float(op, "x", x)
