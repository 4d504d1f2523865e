"""RsCIN: each image's score averaged with those of its nearest images in descriptor space; float64."""

import torch


def neighbor_rescoring_reference(scores: torch.Tensor, descriptors: torch.Tensor, neighbors: str) -> torch.Tensor:
    """Scores [N] float32 in [0, 1]; `neighbors` is a comma-separated list of neighbourhood sizes, self included."""
    s, e = scores.double(), descriptors.double()
    span = s.amax() - s.amin()
    s = (s - s.amin()) / torch.where(span > 0, span, 1)
    w = (e @ e.T).clamp_min(0)  # an image of opposite sign has no say
    order = w.detach().argsort(stable=True, dim=1, descending=True)
    results = []
    for k in map(int, neighbors.split(",")):
        index = order[:, :k]
        weight = w.gather(1, index)
        total = weight.sum(1)
        mean = (weight * s[index]).sum(1) / torch.where(total > 0, total, 1)
        results.append(torch.where(total > 0, mean, s))
    return torch.stack(results).mean(0).float()
