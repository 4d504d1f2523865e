"""What a token is worth: attention it receives from a few queries, or its likeness to anchor tokens.

Plain PyTorch on purpose: the rows of a few queries are a small product, and the attention itself stays the model's
(fused) one. No [L, L] matrix is made.
"""

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_alike, check_choice, check_dtype, check_float, check_rank

REDUCTIONS = ("max", "mean")


def _check_heads(op: str, keys: torch.Tensor, mask: torch.Tensor | None) -> None:
    check_rank(op, "keys", keys, 4, "[B, H, L, d]")
    check_float(op, "keys", keys)
    batch, _, length, _ = keys.shape
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
        if tuple(mask.shape) != (batch, length):
            raise ValueError(f"{op}: mask must be [{batch}, {length}] like keys, got {list(mask.shape)}")


def score_by_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each token receives from some queries, averaged over heads and queries.

    `score[b, i] = mean over h, t of exp(scale <q_t, k_i> - lse_t)`, `lse_t = logsumexp over i of scale <q_t, k_i>`.

    Only the rows of the given queries are computed: [B, H, Q, L] float32 of memory. The scores of the tokens that may
    go are a slice of the result: `score_by_attention(q[:, :, -77:], k)[:, 1 : 1 + image_tokens]`.

    Args:
        queries: [B, H, Q, d], float32, bfloat16 or float16, any strides; Q of at least 1, e.g. the text tokens, or the
            last tokens of a long context.
        keys: [B, H, L, d], dtype and device of `queries`: all the tokens that the softmax runs over.
        scale: None: d ** -0.5.
        mask: [B, L] bool; False: the token is not attended to and scores 0.
        logsumexp: [B, H, Q] float32, as a fused attention returned it for these queries; None: computed here.

    Returns:
        [B, L] float32, summing to 1 over the tokens. A NaN logit counts as -inf; queries that are NaN are left out of
        the mean, and the scores of a sample are NaN only where all its queries are.

    Raises:
        ValueError: wrong rank, shapes that do not fit, no queries.
        TypeError: another dtype, or dtypes that differ.

    Source: FSVG, selection by text (public code; there the full matrix is made). All 77 text positions count there,
    padding included; leave them out of `queries` to change that.
    """
    op = "score_by_attention"
    _check_heads(op, keys, mask)
    check_rank(op, "queries", queries, 4, "[B, H, Q, d]")
    check_alike(op, "queries", queries, "keys", keys)
    (batch, heads, _, width), count = keys.shape, queries.shape[2]
    if (*queries.shape[:2], queries.shape[3]) != (batch, heads, width) or count == 0:
        raise ValueError(
            f"{op}: queries must be [{batch}, {heads}, Q, {width}] like keys with Q >= 1, got {list(queries.shape)}"
        )
    if logsumexp is not None and tuple(logsumexp.shape) != (batch, heads, count):
        raise ValueError(f"{op}: logsumexp must be [{batch}, {heads}, {count}], got {list(logsumexp.shape)}")
    logits = (queries.float() * (width**-0.5 if scale is None else scale)) @ keys.float().transpose(-1, -2)
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    if mask is not None:
        logits = torch.where(mask[:, None, None], logits, -torch.inf)
    weights = logits.softmax(-1) if logsumexp is None else (logits - logsumexp[..., None]).exp()
    scores = weights.nanmean((1, 2))
    return scores if mask is None else torch.where(mask, scores, 0.0)


def score_by_logits(
    query: torch.Tensor, keys: torch.Tensor, *, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax over the tokens of the head-averaged logits of one query.

    `p = softmax over j of mean over h of scale <q_h, k_hj>`: heads are averaged before the softmax, not after it.

    Args:
        query: [B, H, d], float32, bfloat16 or float16, any strides: the query of the register token.
        keys: [B, H, L, d], dtype and device of `query`: the tokens that may go, and no others.
        scale: None: d ** -0.5.
        mask: [B, L] bool; False: the token is absent and scores 0.

    Returns:
        [B, L] float32, summing to 1 over the tokens. A NaN logit counts as -inf; scores are NaN only where all logits
        of the sample are.

    Raises:
        ValueError: wrong rank, shapes that do not fit.
        TypeError: another dtype, or dtypes that differ.

    Source: EEVG, decoder (public code).
    """
    op = "score_by_logits"
    _check_heads(op, keys, mask)
    check_rank(op, "query", query, 3, "[B, H, d]")
    check_alike(op, "query", query, "keys", keys)
    batch, heads, _, width = keys.shape
    if tuple(query.shape) != (batch, heads, width):
        raise ValueError(f"{op}: query must be [{batch}, {heads}, {width}] like keys, got {list(query.shape)}")
    factor = (width**-0.5 if scale is None else scale) / max(heads, 1)
    logits = torch.einsum("bhd,bhld->bl", query.float() * factor, keys.float())
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    if mask is None:
        return logits.softmax(-1)
    return torch.where(mask, torch.where(mask, logits, -torch.inf).softmax(-1), 0.0)


def score_by_similarity(x: torch.Tensor, anchors: torch.Tensor, reduction: str = "max") -> torch.Tensor:
    """Likeness of each token to some anchor tokens: the maximum, or the mean, of its cosines with them.

    `score[b, i] = max (or mean) over m of <x_i, a_m> / (|x_i| |a_m|)`.

    Args:
        x: [B, N, D], float32, bfloat16 or float16, any strides.
        anchors: [B, M, D], or [M, D] for all samples; M of at least 1; dtype and device of `x`: the tokens of the
            question, or of the part of a context that must stay.
        reduction: "max" or "mean".

    Returns:
        [B, N] float32, -1 to 1; a zero vector is like nothing: 0. An anchor that holds NaN or infinity is left out;
        a token that does scores NaN, and so does every token where no anchor is left.

    Raises:
        ValueError: wrong rank, shapes that do not fit, no anchors, an unknown reduction.
        TypeError: another dtype, or dtypes that differ.

    Source: the common form of pruning by similarity to a query; no single publication.
    """
    op = "score_by_similarity"
    check_rank(op, "x", x, 3, "[B, N, D]")
    check_float(op, "x", x)
    check_alike(op, "anchors", anchors, "x", x)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    fits = anchors.dim() == 2 or (anchors.dim() == 3 and anchors.shape[0] == x.shape[0])
    if not fits or anchors.shape[-1] != x.shape[2] or anchors.shape[-2] == 0:
        raise ValueError(
            f"{op}: anchors must be [M, {x.shape[2]}] or [{x.shape[0]}, M, {x.shape[2]}] with M >= 1, "
            f"got {list(anchors.shape)}"
        )
    a, b = (F.normalize(t.float(), dim=-1, eps=torch.finfo(torch.float32).tiny) for t in (x, anchors))
    cosines = a @ b.transpose(-1, -2)
    if reduction == "mean":
        return cosines.nanmean(-1)
    missing = cosines.isnan()
    return torch.where(missing.all(-1), torch.nan, torch.where(missing, -torch.inf, cosines).amax(-1))
