"""cosines to prototypes, and cos([z, z w_k], r_k) of the predicted class k; float64."""

import torch
from torch.nn import functional as F


def prototype_reference(
    features: torch.Tensor, prototypes: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosine to the prototype of the label, the largest one to another, and its class; [N] each."""
    cosines = F.normalize(features.double(), dim=1) @ F.normalize(prototypes.double(), dim=1).T  # cos(v, w_j)
    own = labels.long()[:, None]
    positive = cosines.gather(1, own)[:, 0]  # cos(v, w_y)
    negative = cosines.scatter(1, own, -torch.inf)  # j != y
    return positive, negative.amax(1), negative.argmax(1)


def attenuation_reference(
    features: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit, its class k, and cos([z, z w_k], r_k); [N] each."""
    z, w = features.double(), weight.double()
    logits = z @ w.T
    k = logits.argmax(1)
    q = torch.cat([z, z * w[k]], 1)  # before and after attenuation by the class's weights
    return logits.amax(1), k, F.cosine_similarity(q, reference.double()[k], dim=1, eps=1e-12)
