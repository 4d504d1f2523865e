"""One row of an attention rollout, without the attention matrices and without a product of matrices."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_alike, check_float, check_rank

OP = "roll_out_row"


def roll_out_row(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    *,
    row: int = 0,
    scale: float | None = None,
    chunk: int = 256,
) -> torch.Tensor:
    """How much each token of the input contributes to one token of the output, through all layers.

    With S_l the attention of layer l, averaged over heads, and R = Sbar_L ... Sbar_1, Sbar_l = (S_l + I) / 2, this is
    row `row` of R, from the last layer to the first:

        r = e_row Sbar_L,  then r <- r / 2 + r S_l / 2  for l = L - 1, ..., 1

    2 N^2 H d operations a layer from saved queries and keys, instead of 2 N^3 for the product; the layers themselves
    can run a fused attention. Rows of S_l are computed `chunk` at a time and dropped: [B, H, chunk, N] float32 of
    memory.

    Args:
        queries: q_1 to q_L, each [B, H_l, N, d], float32, bfloat16 or float16, any strides; at least one layer.
        keys: k_1 to k_L, each like its queries.
        row: the token of the output; 0 is the class token. Negative: from the end.
        scale: of the logits; None: d ** -0.5.
        chunk: rows of S_l at a time, at least 1.

    Returns:
        [B, N] float32, summing to 1. Rows of NaN attention spread as NaN times their share, as in the product.

    Raises:
        ValueError: no layers, numbers of layers or shapes that differ, `row` that is not there, `chunk` below 1.
        TypeError: another dtype, or keys of another dtype than their queries.

    Source: Zhu et al., "Dual cross-attention learning" (DCAL, CVPR 2022), section 3.2: attention rollout; Abnar and
    Zuidema (2020). One row instead of the product is our rearrangement. The mean over heads is not stated in DCAL.
    """
    _check(queries, keys, row, chunk)
    tokens = queries[0].shape[2]
    row = row % tokens
    r = None
    for q, k in reversed(list(zip(queries, keys, strict=True))):
        factor = q.shape[3] ** -0.5 if scale is None else scale
        columns = k.float().mT
        if r is None:  # of the last layer one row counts
            seen = (factor * q[:, :, row : row + 1].float() @ columns).softmax(-1).mean((1, 2))
            own = F.one_hot(torch.tensor(row, device=q.device), tokens).float()
            r = 0.5 * own + 0.5 * seen
            continue
        total = torch.zeros_like(r)
        for first in range(0, tokens, chunk):
            weights = (factor * q[:, :, first : first + chunk].float() @ columns).softmax(-1)
            total = total + torch.einsum("bi,bhij->bj", r[:, first : first + chunk], weights)
        r = 0.5 * r + 0.5 / q.shape[1] * total
    assert r is not None
    return r


def _check(queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], row: int, chunk: int) -> None:
    if not queries or len(keys) != len(queries):
        raise ValueError(f"{OP}: keys must hold as many layers as queries, 1 or more, got {len(keys)}, {len(queries)}")
    for layer, (q, k) in enumerate(zip(queries, keys, strict=True)):
        check_rank(OP, f"queries[{layer}]", q, 4, "[B, H, N, d]")
        check_float(OP, f"queries[{layer}]", q)
        check_alike(OP, f"keys[{layer}]", k, f"queries[{layer}]", q)
        if k.shape != q.shape:
            raise ValueError(f"{OP}: keys[{layer}] must be {list(q.shape)} like its queries, got {list(k.shape)}")
        if (q.shape[0], q.shape[2]) != (queries[0].shape[0], queries[0].shape[2]) or 0 in q.shape[1:]:
            needed = f"[{queries[0].shape[0]}, H, {queries[0].shape[2]}, d] with H, N and d at least 1"
            raise ValueError(f"{OP}: queries[{layer}] must be {needed}, got {list(q.shape)}")
    tokens = queries[0].shape[2]
    if not -tokens <= row < tokens:
        raise ValueError(f"{OP}: row must be one of the {tokens} tokens, got {row}")
    if chunk < 1:
        raise ValueError(f"{OP}: chunk must be at least 1, got {chunk}")
