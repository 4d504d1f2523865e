"""For each source token the destination of largest cosine similarity, in float64."""

import torch


def token_matching_reference(
    metric: torch.Tensor, src: torch.Tensor, dst: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity [B, n] float32 and position in `dst` [B, n] int32; NaN and 0 for a source that cannot be matched."""
    m = metric.double()
    finite = m.isfinite().all(2)
    m = torch.where(finite[..., None], m, 0)
    largest = m.abs().amax(2, keepdim=True) if m.shape[2] else m.new_zeros(*m.shape[:2], 1)
    m = m / torch.where(largest > 0, largest, 1)  # squares stay in range
    length = m.norm(dim=2, keepdim=True)
    unit = m / torch.where(length > 0, length, 1)  # m / |m|; a zero token stays zero
    a, b = unit[:, src], unit[:, dst]
    valid = finite[:, src, None] & finite[:, None, dst]
    similarity = torch.where(valid, a @ b.mT, -torch.inf)
    best = similarity.argmax(2)  # the lower position on ties
    value = similarity.gather(2, best[..., None])[..., 0]
    return torch.where(value == -torch.inf, torch.nan, value).float(), best.int()
