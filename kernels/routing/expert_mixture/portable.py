"""Every expert on every token, then the sum over those chosen: no size depends on the routing."""

import torch

from planmill.kernels.routing.expert_mixture.reference import ACTIVATIONS


def expert_mixture_portable(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor, activation: str, weight_on_input: bool,
) -> torch.Tensor:  # fmt: skip
    """See the reference; in float32, and E / k times its arithmetic."""
    experts, _, f = down.shape
    tokens, k = indices.shape
    a = weights.float()
    chosen = indices[..., None] == torch.arange(experts, dtype=indices.dtype, device=x.device)  # [T, k, E]
    h = x.float()
    if weight_on_input:  # an expert sees a_tj x_t, which is not linear in a_tj: one row for each place
        h = (a[..., None] * h[:, None]).flatten(0, 1)
        chosen = chosen.flatten(0, 1)[:, None]  # [T k, 1, E]
    h = h @ up.float().mT  # [E, rows, F or 2 F]
    if up_bias.numel():
        h = h + up_bias.float()[:, None]
    gate, rest = (h[..., :f], h[..., f:]) if up.shape[1] == 2 * f else (h, None)
    h = ACTIVATIONS[activation](gate)
    y = (h if rest is None else h * rest) @ down.float().mT
    if down_bias.numel():
        y = y + down_bias.float()[:, None]
    share = torch.where(chosen, 1.0 if weight_on_input else a[..., None], 0.0).sum(1).T[..., None]  # [E, rows, 1]
    terms = torch.where(chosen.any(1).T[..., None], share * y, 0)
    total = terms.sum(0)
    total = total.unflatten(0, (tokens, k)).sum(1) if weight_on_input else total
    return total.to(x.dtype)
