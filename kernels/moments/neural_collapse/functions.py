"""Neural collapse from the moments of the classes: algebra of K x K matrices, without a pseudo-inverse of d x d."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.moments.class_moments import average_by_class


class CollapseMetrics(NamedTuple):
    """Each is 0 in full collapse, but `agreement`, which is 1.

    Attributes:
        variability: NC1, tr(S_W S_B^+) / K: spread within classes against that of their means.
        equinorm: NC2, deviation of the lengths of the class means by their mean.
        equiangular: NC2, deviation of the cosines between class means.
        angle: NC2, mean of |cosine + 1 / (K - 1)|: how far from the angles of a simplex.
        duality: NC3, Frobenius distance of weight and class means, each scaled to length one.
        agreement: NC4, share of rows where the classifier and the nearest class mean agree.
    """

    variability: float
    equinorm: float
    equiangular: float
    angle: float
    duality: float
    agreement: float


@torch.no_grad()
def measure_collapse(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> CollapseMetrics:
    """The four properties of neural collapse of a classifier's last features.

    With M the class means about their own mean, G = M M^T / K = V L V^T and S_W the scatter within classes over N:
    tr(S_W S_B^+) = tr(V L^-2 V^T M S_W M^T) / K, over the eigenvalues that are not 0 (at most K - 1).

    Args:
        features: [N, d], float32, bfloat16 or float16; what the last linear layer is given.
        labels: [N], int64 or int32, 0 to K - 1; rows of label -1 are left out.
        weight: [K, d], of the last linear layer, any float dtype.
        bias: [K], or None for 0; it counts in `agreement` only.

    Returns:
        A CollapseMetrics; sums over rows are those of `average_by_class`, the rest is float64.

    Raises:
        ValueError: wrong ranks or sizes, fewer than two classes, a class without rows, NaN or infinity, a class mean
            that is the mean of all of them: its angles are not defined.
        TypeError: other dtypes.

    Source: Papyan, Han, Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training"
        (PNAS 2020), section 2. Class means are taken about their own mean, not that of the rows, which is the same
        where classes are equally frequent.
    """
    op = "measure_collapse"
    check_rank(op, "features", features, 2, "[N, d]")
    check_float(op, "features", features)
    check_rank(op, "weight", weight, 2, "[K, d]")
    classes, d = weight.shape
    if classes < 2 or d != features.shape[1]:
        raise ValueError(f"{op}: weight must be [K, {features.shape[1]}] with K at least 2, got {list(weight.shape)}")
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"{op}: bias must be [{classes}], got {list(bias.shape)}")
    counts, class_means, scatter = average_by_class(features, labels, classes)
    if bool((counts == 0).any()):
        raise ValueError(f"{op}: class {int((counts == 0).nonzero()[0])} has no rows")
    mu, w = class_means.double(), weight.double()
    if not bool(mu.isfinite().all()):
        row = int((~features.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{op}: features hold NaN or infinity in row {row}")
    m = mu - mu.mean(0)
    norm = m.norm(dim=1)
    if float(norm.min()) <= 1e-7 * float(mu.norm(dim=1).max()):
        raise ValueError(f"{op}: the mean of class {int(norm.argmin())} is the mean of all: angles are not defined")
    values, vectors = torch.linalg.eigh(m @ m.T / classes)
    kept = values > max(classes, d) * torch.finfo(torch.float64).eps * values.max()
    within = vectors.T @ (m @ scatter.double() @ m.T / counts.sum()) @ vectors
    variability = float((within.diagonal()[kept] / values[kept] ** 2).sum()) / classes**2
    cosines = (m @ m.T / norm / norm[:, None])[~torch.eye(classes, dtype=torch.bool, device=m.device)]
    return CollapseMetrics(
        variability,
        float(norm.std(correction=0) / norm.mean()),
        float(cosines.std(correction=0)),
        float((cosines + 1 / (classes - 1)).abs().mean()),
        float((w / w.norm() - m / m.norm()).norm()),
        _agreement(features[labels >= 0].float(), class_means, weight.float(), bias),
    )


def _agreement(x: torch.Tensor, means: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """About the mean of the class means, so that a common offset costs no accuracy; |x - mu|^2 without |x|^2."""
    center = means.mean(0)
    m = means - center
    nearest = F.linear(x - center, m, -0.5 * (m * m).sum(1)).argmax(1)
    chosen = F.linear(x, weight, None if bias is None else bias.float()).argmax(1)
    return float((nearest == chosen).double().mean())
