"""Each list is a segment of the members, and its row the sum over it."""

import torch

from planmill.kernels.common.portable import sum_segments


def token_merging_portable(x: torch.Tensor, offsets: torch.Tensor, members: torch.Tensor, mean: bool) -> torch.Tensor:
    """See the reference; in float32."""
    picked = x.float().gather(1, members.long().clamp(0)[..., None].expand(-1, -1, x.shape[2]))
    begin, length = offsets[:, :-1].long(), (offsets[:, 1:] - offsets[:, :-1]).long()
    merged = sum_segments(picked, begin, length)
    if mean:
        merged = merged / length.clamp_min(1)[..., None].float()
    return merged.to(x.dtype)
