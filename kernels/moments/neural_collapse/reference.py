"""Neural collapse by its definition, with d x d matrices and a pseudo-inverse; float64."""

import torch


def neural_collapse_reference(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[float, ...]:
    """NC1, equinorm, equiangular, largest angle, NC3, NC4 of labelled features [N, d], weight [K, d], bias [K]."""
    h, y, w, classes = features.double(), labels.long(), weight.double(), len(weight)
    mu = torch.stack([h[y == c].mean(0) for c in range(classes)])
    m = mu - mu.mean(0)  # about the mean of the class means
    z = h - mu[y]
    s_w, s_b = z.T @ z / len(h), m.T @ m / classes
    nc1 = (s_w @ torch.linalg.pinv(s_b, rtol=1e-10, hermitian=True)).trace() / classes
    norm = m.norm(dim=1)
    off = ~torch.eye(classes, dtype=torch.bool)
    cosine = (m @ m.T / norm / norm[:, None])[off]
    nc3 = (w / w.norm() - m / m.norm()).norm()
    nc4 = ((h @ w.T + bias.double()).argmax(1) == torch.cdist(h, mu).argmin(1)).double().mean()
    equinorm = norm.std(correction=0) / norm.mean()
    largest = (cosine + 1 / (classes - 1)).abs().mean()
    return tuple(float(v) for v in (nc1, equinorm, cosine.std(correction=0), largest, nc3, nc4))
