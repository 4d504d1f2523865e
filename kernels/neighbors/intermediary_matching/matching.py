"""The three routes of FAIM as products: intermediaries are averaged first, so no [n, k, m] exists."""

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_alike, check_matrices, check_rank
from planmill.kernels.neighbors.knn import find_neighbors

OP = "intermediary_matching"


def _check_pair(keys: torch.Tensor, values: torch.Tensor, name: str) -> None:
    check_rank(OP, f"{name}_values", values, 2, "[n, E]")
    check_alike(OP, f"{name}_values", values, f"{name}_keys", keys)
    if len(values) != len(keys):
        raise ValueError(f"{OP}: {name}_values must have {len(keys)} rows like {name}_keys, got {len(values)}")


def average_intermediaries(
    keys: torch.Tensor,
    gallery_keys: torch.Tensor,
    gallery_values: torch.Tensor,
    k: int,
    *,
    temperature: float = 0.1,
    exclude_self: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean value of each row's nearest gallery rows, and how near these are.

    `T(i) = k nearest gallery rows by cos(u_i, u_t)`, `a_it = softmax over T(i) of cos / temperature`; the mean is
    `sum_t a_it v_t / |v_t|`, the availability `max(0, sum_t a_it cos(u_i, u_t))`.

    Args:
        keys: [n, D] with D >= 1, float32, bfloat16 or float16: u.
        gallery_keys: [m, D], dtype and device of `keys`.
        gallery_values: [m, E], likewise: v.
        k: intermediaries of a row, 1 to 1024.
        temperature: above 0; infinity weighs all alike.
        exclude_self: row i of `keys` is row i of the gallery, and no intermediary of its own.

    Returns:
        means: [n, E] float32; 0 where nothing matches.
        availability: [n] float32 from 0 to 1.

    Raises:
        ValueError: wrong rank, width or length, k or temperature out of range, `exclude_self` with n != m.
        TypeError: another dtype, or dtypes that differ.

    Source: FAIM (re-identification of persons who change clothes): the three routes; its weights could not be read, so
        the softmax and the availability are ours.
    """
    check_matrices(OP, keys, gallery_keys, ("keys", "gallery_keys"))
    _check_pair(gallery_keys, gallery_values, "gallery")
    if not temperature > 0:
        raise ValueError(f"{OP}: temperature must be above 0, got {temperature}")
    distances, found = find_neighbors(keys, gallery_keys, k, "cosine", exclude_self=exclude_self)
    if gallery_keys.shape[0] == 0:
        means = gallery_values.new_zeros(len(keys), gallery_values.shape[1], dtype=torch.float32)
        return means, torch.zeros_like(distances[:, 0])
    similar = torch.where(found >= 0, 1 - distances, -torch.inf)
    logits = torch.where(found >= 0, similar / temperature, -torch.inf)  # -inf / inf would be NaN
    share = torch.where(found >= 0, torch.softmax(logits, 1), 0).nan_to_num()
    values = F.pad(F.normalize(gallery_values.float(), dim=1), (0, 0, 0, 1))  # its last row, zeros, is what -1 names
    means = torch.einsum("nk,nke->ne", share, values[torch.where(found < 0, len(gallery_keys), found).long()])
    return means, (share * torch.where(found >= 0, similar, 0)).sum(1).clamp_min(0)


def match_intermediaries(
    query_values: torch.Tensor,
    gallery_values: torch.Tensor,
    query_route: tuple[torch.Tensor, torch.Tensor],
    gallery_route: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Similarity of queries and gallery over three routes: direct, and through either side's intermediaries.

    `s = (v_q . v_g + b_q mean_T(q) . v_g + b_g v_q . mean_T(g)) / (1 + b_q + b_g)`, v of unit length. The sums over
    intermediaries are inside the means (`average_intermediaries`): three matrix products in all.

    Args:
        query_values: [n, E], float32, bfloat16 or float16.
        gallery_values: [m, E], dtype and device of `query_values`.
        query_route: means [n, E] and weights b_q [n] >= 0, float32; the weights are the availability, times how far the
            intermediaries can be trusted where that is known.
        gallery_route: means [m, E] and weights b_g [m] >= 0, likewise.

    Returns:
        [n, m] float32, larger is more alike.

    Raises:
        ValueError: wrong rank, width or length.
        TypeError: another dtype, or dtypes that differ.

    Source: FAIM, see `average_intermediaries`; the form of the weighted mean is ours.
    """
    check_matrices(OP, query_values, gallery_values, ("query_values", "gallery_values"))
    for name, values, (means, weights) in (
        ("query_route", query_values, query_route),
        ("gallery_route", gallery_values, gallery_route),
    ):
        if means.shape != values.shape or weights.shape != values.shape[:1]:
            raise ValueError(
                f"{OP}: {name} must be {list(values.shape)} and [{len(values)}], "
                f"got {list(means.shape)} and {list(weights.shape)}"
            )
    own, theirs = (F.normalize(v.float(), dim=1) for v in (query_values, gallery_values))
    (query_mean, b_q), (gallery_mean, b_g) = query_route, gallery_route
    left = own + b_q[:, None] * query_mean  # two routes share the gallery's values: one product
    score = left @ theirs.T + b_g * (own @ gallery_mean.T)
    return score / (1 + b_q[:, None] + b_g)
