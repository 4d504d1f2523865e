"""Shared sub-dimensions and the routed groups of a hidden vector, everything else zero.

Plain PyTorch on purpose: a vision model's tokens together use every group, so that no weight stays unread, and a dense
product of the masked vector is as fast as gathered slices of it.
"""

import torch

from planmill.kernels.common.checks import check_dtype, check_float


def select_hidden(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, shared: int, groups: int, *, scale: float = 1.0
) -> torch.Tensor:
    """A hidden vector reduced to its shared dimensions and the groups of its token.

    `y[:Ds] = scale * x[:Ds]`, `y[grp_i] = scale * a_i * x[grp_i]` for the chosen groups i, otherwise 0: what stands in
    a group that was not chosen is not read. In front of a linear map it makes it input-sparse, behind one
    output-sparse.

    Args:
        x: [..., D] with D = shared + groups * g, float32, bfloat16 or float16, any strides.
        indices: [..., K] int32 or int64: the groups of each token, each at most once, below `groups`; -1 drops one.
        weights: [..., K] float32: a.
        shared: Ds, the dimensions in front that every token uses; from 0.
        groups: G, the number of groups behind them.
        scale: a factor on everything, e.g. D / (Ds + K g).

    Returns:
        Shape and dtype of `x`; the factors are multiplied in float32, and the product is rounded once.

    Raises:
        ValueError: shapes that do not fit, dimensions that are no whole number of groups.
        TypeError: another dtype.

    Source: Mixture of Hidden-Dimensions (MoHD), from its abstract; the form of the weights is ours.
    """
    op = "select_hidden"
    check_float(op, "x", x)
    width = x.shape[-1] if x.dim() else 0
    if x.dim() == 0 or groups < 1 or not 0 <= shared < width or (width - shared) % groups:
        raise ValueError(
            f"{op}: x must be [..., D] with D = shared + groups * g and g >= 1, "
            f"got {list(x.shape)} with shared={shared} and groups={groups}"
        )
    if indices.shape[:-1] != x.shape[:-1] or indices.shape != weights.shape:
        raise ValueError(
            f"{op}: indices and weights must be {[*x.shape[:-1], 'K']}, got {list(indices.shape)} and "
            f"{list(weights.shape)}"
        )
    check_dtype(op, "indices", indices, torch.int32, torch.int64)
    check_dtype(op, "weights", weights, torch.float32)
    chosen = indices[..., None] == torch.arange(groups, device=x.device, dtype=indices.dtype)  # [..., K, G]
    factor = torch.where(chosen, scale * weights[..., None], 0.0).sum(-2)[..., None]
    routed = x[..., shared:].unflatten(-1, (groups, -1))
    routed = torch.where(chosen.any(-2)[..., None], routed * factor, 0.0).flatten(-2).to(x.dtype)
    return torch.cat([x[..., :shared] * scale, routed], -1)
