"""y_i = softmax_j(scale <q_i, k_j> + <q_i, rel_h[jy-iy+win-1]> + <q_i, rel_w[jx-ix+win-1]>) v_j; float64."""

import torch
from torch.nn import functional as F


def windows(x: torch.Tensor, block: int, halo: int) -> torch.Tensor:
    """[B, h, d, P, R, win, win] of x [B, h, d, P b, R b]: each block and its halo, zeros outside the image."""
    win = block + 2 * halo
    return F.pad(x, [halo] * 4).unfold(3, win, block).unfold(4, win, block)


def halo_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor,
    block: int, halo: int, stride: int, scale: float, masked: bool, scale_positions: bool,
) -> torch.Tensor:  # fmt: skip
    """y [B, h, dv, H / t, W / t] of q [B, h, d, H / t, W / t], k [B, h, d, H, W], v [B, h, dv, H, W]; dtype of q."""
    shape = (*v.shape[:3], *q.shape[3:])
    if q.numel() == 0 or v.numel() == 0:
        return q.new_zeros(shape)
    b, win = block // stride, block + 2 * halo  # queries and keys of a block, along one axis
    blocks = q.double().unflatten(4, (-1, b)).unflatten(3, (-1, b))  # [B, h, d, P, y, R, x]
    K, V = windows(k.double(), block, halo), windows(v.double(), block, halo)
    offset = torch.arange(win, device=q.device) - torch.arange(b, device=q.device)[:, None] + win - 1  # [b, win]
    pw = torch.einsum("bhdpyrx,xwd->bhpryxw", blocks, rel_w.double()[offset])
    ph = torch.einsum("bhdpyrx,yzd->bhpryxz", blocks, rel_h.double()[offset])
    positions = ph[..., :, None] + pw[..., None, :]  # [B, h, P, R, y, x, win, win]
    logits = scale * torch.einsum("bhdpyrx,bhdprzw->bhpryxzw", blocks, K)
    logits = logits + (scale if scale_positions else 1.0) * positions
    if masked:
        inside = windows(torch.ones_like(k[:1, :1, :1], dtype=torch.float64), block, halo)[0, 0, 0]  # [P, R, win, win]
        logits = logits.masked_fill(inside[:, :, None, None] == 0, -torch.inf)
    weights = logits.flatten(6).softmax(6).view_as(logits)
    y = torch.einsum("bhpryxzw,bhdprzw->bhdpyrx", weights, V)
    return y.reshape(shape).to(q.dtype)
