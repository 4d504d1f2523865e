"""mu' = (1 - g) mu + g sum w_i mu_i, S' = (1 - g) S + g sum w_i S_i + a I, over the q nearest head classes; float64."""

import torch


def calibration_reference(
    means: torch.Tensor, covariances: torch.Tensor, head_means: torch.Tensor, head_covariances: torch.Tensor,
    head_counts: torch.Tensor, neighbors: int, mixing: float, spread: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Means [K, d] and covariances [K, d, d] of the tail classes, one class at a time."""
    mu, sigma = [], []
    for m, s in zip(means.double(), covariances.double(), strict=True):
        distance = (head_means.double() - m).square().sum(1)
        nearest = distance.argsort(stable=True)[:neighbors]
        w = head_counts.double()[nearest]  # classes with more rows are known better
        w = w / w.sum()
        mu.append((1 - mixing) * m + mixing * sum(w[i] * head_means[j].double() for i, j in enumerate(nearest)))
        borrowed = sum(w[i] * head_covariances[j].double() for i, j in enumerate(nearest))
        sigma.append((1 - mixing) * s + mixing * borrowed + spread * torch.eye(len(m), dtype=torch.float64))
    return torch.stack(mu), torch.stack(sigma)
