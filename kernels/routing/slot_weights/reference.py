"""D = softmax of L over the tokens, C = softmax of L over the slots, or phi of the standardised L over its row sum."""

import torch

WEIGHTINGS = ("softmax", "linear")
EPSILON, ROW_EPSILON = 1e-5, 1e-6  # of the variance, of the sum of a row of phi
LARGEST = 1e38  # a logit above counts as this


def softmax(L: torch.Tensor, dim: int) -> torch.Tensor:
    """Over `dim`; zeros where all are -inf."""
    e = torch.exp(L - L.detach().amax(dim, keepdim=True).clamp_min(-LARGEST))
    return e / e.sum(dim, keepdim=True).clamp_min(1)


def slot_weights_reference(
    logits: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor, weighting: str, scale_dispatch: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dispatch weights D and combine weights C, both [B, N, S] float32."""
    L = logits.double() * (scale.double()[..., None] if scale.numel() else 1)  # [B, N, S]
    if L.numel() == 0:
        return L.float(), L.float()
    gone = ~mask[..., None].expand_as(L) if mask.numel() else torch.zeros_like(L, dtype=torch.bool)
    nan = L.isnan() & ~gone
    out = gone | L.isnan() | L.isneginf()
    L = L.clamp_max(LARGEST).masked_fill(out, -torch.inf)
    D = softmax(L, 1)
    if weighting == "softmax":
        C = softmax(L, 2)
    else:
        count = (~out).sum(1, keepdim=True).clamp_min(1)
        below = torch.where(out, 0, L - L.detach().amax(1, keepdim=True))  # equal logits: exactly 0
        centred = torch.where(out, 0, below - below.sum(1, keepdim=True) / count)
        h = centred / ((centred**2).sum(1, keepdim=True) / count + EPSILON).sqrt()
        phi = torch.where(out, 0, torch.where(h > 0, h + 1, h.clamp_max(0).exp()))  # elu + 1
        C = phi / (phi.sum(2, keepdim=True) + ROW_EPSILON)
    if scale_dispatch:
        D = D * torch.where(out, 0, scale.double()[..., None])
    D = D.masked_fill(((nan | gone).all(1, keepdim=True) & nan.any(1, keepdim=True)), torch.nan)
    return D.float(), C.masked_fill(nan.all(2, keepdim=True) & nan.any(2, keepdim=True), torch.nan).float()
