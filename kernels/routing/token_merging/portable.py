"""Every list entry adds its token to its row; entries past the last list add to a row that is dropped."""

import torch


def token_merging_portable(x: torch.Tensor, offsets: torch.Tensor, members: torch.Tensor, mean: bool) -> torch.Tensor:
    """See the reference; in float32."""
    listed, rows, channels = members.shape[1], offsets.shape[1] - 1, x.shape[2]
    position = torch.arange(listed, dtype=offsets.dtype, device=x.device)
    row = (position[None, :, None] >= offsets[:, None, 1:]).sum(2)  # [B, listed], `rows` where unused
    picked = x.float().gather(1, members.long().clamp(0)[..., None].expand(-1, -1, channels))
    merged = x.new_zeros(x.shape[0], rows + 1, channels, dtype=torch.float32)
    merged = merged.scatter_add(1, row[..., None].expand(-1, -1, channels), picked)[:, :rows]
    if mean:
        merged = merged / (offsets[:, 1:] - offsets[:, :-1]).clamp_min(1)[..., None].float()
    return merged.to(x.dtype)
