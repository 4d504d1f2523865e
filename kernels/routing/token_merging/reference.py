"""Each merged row is the mean (or sum) of the tokens that its list names, in float64."""

import torch


def token_merging_reference(x: torch.Tensor, offsets: torch.Tensor, members: torch.Tensor, mean: bool) -> torch.Tensor:
    """Rows [B, N_m, C] of the dtype of x; an empty list gives zeros."""
    batch, listed = members.shape
    rows = offsets.shape[1] - 1
    position = torch.arange(listed, dtype=torch.int32, device=x.device).expand(batch, -1).contiguous()
    row = torch.searchsorted(offsets[:, 1:].contiguous(), position, right=True)  # that each list entry belongs to
    used = row < rows
    entry = torch.arange(batch, device=x.device)[:, None].expand(-1, listed)[used]
    picked = x.double()[entry, members[used].long()]
    merged = x.new_zeros(batch, rows, x.shape[2], dtype=torch.float64).index_put((entry, row[used]), picked, True)
    if mean:
        merged = merged / (offsets[:, 1:] - offsets[:, :-1]).clamp_min(1)[..., None]
    return merged.to(x.dtype)
