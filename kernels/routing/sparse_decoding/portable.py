"""The rows that the indices name, gathered for every place: no size depends on how many are used."""

import torch


def sparse_decoding_portable(
    values: torch.Tensor, indices: torch.Tensor, dictionary: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """See the reference; in float32."""
    rows = dictionary[indices.long().clamp_min(0)].float()  # [T, k, D]
    used = (indices >= 0)[..., None]
    found = torch.where(used, values.float()[..., None] * rows, 0).sum(1)
    return (found + bias.float() if bias.numel() else found).to(dictionary.dtype)
