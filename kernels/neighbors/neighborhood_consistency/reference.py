"""The k-th largest of label and representation consistency over the neighbours of each input; float64."""

import torch


def _cosine(dot: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths == 0, 0, dot / torch.where(lengths == 0, 1, lengths))


def neighborhood_consistency_reference(
    features: torch.Tensor, neighbors: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, weight: float, k: int
) -> torch.Tensor:
    """Confidence [B] float32 of features [B, D] with neighbours [B, T, D], logits [B, T, C] and labels [B]."""
    g, g_t, c_t = features.double(), neighbors.double(), logits.double()
    r = _cosine(torch.einsum("btd,bd->bt", g_t, g), g_t, g[:, None])
    c_y = c_t.gather(2, labels.long()[:, None, None].expand(-1, c_t.shape[1], 1))[:, :, 0]
    label = _cosine(c_y, c_t, torch.ones_like(c_t[:, :1, :1]))
    u = weight * label + (1 - weight) * r
    chosen = u.detach().nan_to_num(-torch.inf).sort(dim=1, descending=True, stable=True).indices[:, k - 1 : k]
    return u.gather(1, chosen)[:, 0].float()
