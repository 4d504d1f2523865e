"""What retrieved rows say: votes of classes, or the value of the nearest row."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice
from planmill.kernels.neighbors.code_assignment import assign_codes

WEIGHTS = ("plain", "similarity", "softmax")


def weigh_votes(similarities: torch.Tensor, voting: torch.Tensor, weights: str, temperature: float) -> torch.Tensor:
    """Weights [..., k] in float64, 0 where not `voting`."""
    s = torch.where(voting, similarities, -torch.inf).double()
    if weights == "plain":
        return voting.double()
    if weights == "similarity":
        return torch.where(voting, s, 0).clamp_min(0)
    best = torch.where(voting.any(-1, keepdim=True), s.amax(-1, keepdim=True), 0)
    return ((s - best) / temperature).exp()


def vote_by_class(
    similarities: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    *,
    weights: str = "plain",
    temperature: float = 0.1,
) -> torch.Tensor:
    """Share of the votes that each class gets from k retrieved rows.

    `score_c = sum_j w_j [labels_j = c] / sum_j w_j` with w_j = 1 ("plain"), max(s_j, 0) ("similarity") or
    exp(s_j / temperature) ("softmax").

    Args:
        similarities: [..., k] with k >= 1, float: larger is nearer.
        labels: [..., k], int32 or int64, 0 to C - 1; -1: no vote, as for a similarity that is NaN or infinite.
        classes: C, at least 1.
        weights: "plain", "similarity" or "softmax".
        temperature: of "softmax", above 0.

    Returns:
        [..., C] float32, the sum over classes 1; all 0 where no row has a weight above 0.

    Raises:
        ValueError: different shapes, no rows, `classes` below 1, a label beyond them (looked for on the CPU only),
            unknown weights, a temperature of 0 or below.
        TypeError: labels of another dtype.

    Source: weighted k-nearest-neighbour voting; Dudani, 1976, and with softmax weights Wu et al., "Unsupervised feature
        learning via non-parametric instance discrimination", CVPR 2018, section 3.4.
    """
    op = "retrieval"
    check_choice(op, "weights", weights, WEIGHTS)
    if similarities.shape != labels.shape or labels.dim() < 1 or labels.shape[-1] == 0:
        raise ValueError(
            f"{op}: similarities and labels must both be [..., k] with k at least 1, got {list(similarities.shape)} "
            f"and {list(labels.shape)}"
        )
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: labels must be int32 or int64, got {labels.dtype}")
    if classes < 1 or not 0 < temperature < torch.inf:
        raise ValueError(f"{op}: needs classes of at least 1 and a temperature above 0, got {classes}, {temperature}")
    if labels.device.type == "cpu" and not is_compiling() and bool((labels >= classes).any()):
        raise ValueError(f"{op}: labels must be from -1 to {classes - 1}, got {labels.flatten().tolist()[:8]}")
    voting = (labels >= 0) & similarities.isfinite()
    weight = weigh_votes(similarities, voting, weights, temperature)
    votes = weight.new_zeros((*labels.shape[:-1], classes)).scatter_add(-1, labels.clamp_min(0).long(), weight)
    total = votes.sum(-1, keepdim=True)
    return (votes / torch.where(total > 0, total, 1)).float()


def retrieve_values(
    features: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, metric: str = "l2"
) -> torch.Tensor:
    """The value stored with the key nearest to each vector.

    `values[argmin_j |x - keys_j|]`: with cluster centres as keys and a foreground score for each, a coarse mask of an
    image's patches.

    Args:
        features: [..., D] with D >= 1, float32, bfloat16 or float16, any strides.
        keys: [K, D], dtype and device of `features`.
        values: [K] or [K, V], any float dtype.
        metric: "l2", "cosine" or "dot", as in `assign_codes`.

    Returns:
        [...] or [..., V], dtype of `values`; NaN for a vector that matches no key (K = 0, or it holds NaN or infinity).

    Raises:
        ValueError: wrong ranks, different D, values of another length than keys, an unknown metric.
        TypeError: another dtype, dtypes of features and keys that differ, values that are not float.

    Source: the retrieval step of RAG-SEG, whose centres come from outside.
    """
    op = "retrieve_values"
    if values.dim() not in (1, 2) or keys.dim() != 2 or values.shape[0] != keys.shape[0]:
        raise ValueError(
            f"{op}: keys must be [K, D] and values [K] or [K, V], got {list(keys.shape)} and {list(values.shape)}"
        )
    if not values.is_floating_point():
        raise TypeError(f"{op}: values must be float, got {values.dtype}")
    codes = assign_codes(features, keys, metric=metric)
    padded = torch.cat([values, values.new_full((1, *values.shape[1:]), torch.nan)])  # its last row is what -1 names
    rows = torch.where(codes < 0, keys.shape[0], codes).long()
    return padded.index_select(0, rows.flatten()).view(*codes.shape, *values.shape[1:])
