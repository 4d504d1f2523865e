"""The k largest active latents of h = We x + be, in float64; ties to the lower index."""

import torch
from torch.nn.functional import pad

MODES = ("topk", "abs_topk", "jump_relu")


def sparse_encoding_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: torch.Tensor, k: int, mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [T, k] float32, largest first; indices [T, k], padded with 0 and -1; counts [T] of active latents."""
    h = x.double() @ weight.double().T + (bias.double() if bias.numel() else bias.double().sum())
    h = h + 0 * threshold.double().nan_to_num(0, 0, 0).sum()  # its gradient is zero
    key = h.abs() if mode == "abs_topk" else h
    active = key > 0  # NaN is not
    if mode == "jump_relu":
        active = active & (h >= threshold.double())  # below theta is off, theta itself is on
    unknown = h.isnan().all(1, keepdim=True)
    key = torch.where(active, key, -torch.inf).detach()
    order = key.argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = active.gather(1, order)
    values = torch.where(unknown, h.gather(1, order), torch.where(kept, h.gather(1, order), 0))
    indices = torch.where(kept | unknown, order, -1)
    counts = active.sum(1)
    short = (0, k - order.shape[1])
    counts = counts if mode == "jump_relu" else counts.clamp_max(k)
    return pad(values, short).float(), pad(indices, short, value=-1).int(), counts.int()
