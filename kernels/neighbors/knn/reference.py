"""The k rows of the database nearest to each query, in float64, ties to the lower index."""

import torch

METRICS = ("l2", "l2sq", "cosine", "dot")


def knn_reference(
    queries: torch.Tensor, database: torch.Tensor, k: int, metric: str, exclude_self: bool, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (similarities for "dot") [n, k] float32, best first; indices [n, k] int32; padded with inf and -1."""
    q, x = queries.double(), database.double()
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    if exclude_self:
        valid = valid & ~torch.eye(len(q), dtype=torch.bool, device=q.device)
    return nearest(q, x, valid, k, metric)


def nearest(
    q: torch.Tensor, x: torch.Tensor, valid: torch.Tensor, k: int, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of the pairs [n, m] that are `valid`."""
    q, x = (t.nan_to_num(0, 0, 0) for t in (q, x))
    if metric in ("l2", "l2sq"):
        distance = torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance**2 if metric == "l2sq" else distance
    elif metric == "cosine":
        unit = [torch.nn.functional.normalize(t, dim=1, eps=torch.finfo(t.dtype).tiny) for t in (q, x)]
        distance = 1 - unit[0] @ unit[1].T
    else:
        distance = -(q @ x.T)
    distance = torch.where(valid, distance, torch.inf)
    order = distance.detach().argsort(stable=True, dim=1)[:, :k]
    found = distance.gather(1, order)
    order = torch.where(found.detach() == torch.inf, -1, order)
    pad = (0, k - found.shape[1])
    found = torch.nn.functional.pad(found, pad, value=torch.inf).float()
    return -found if metric == "dot" else found, torch.nn.functional.pad(order, pad, value=-1).int()
