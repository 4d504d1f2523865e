"""Assignment to the nearest code, composed of segmented_min and segmented_max with one segment."""

import torch

from planmill.kernels.common.checks import check_alike, check_choice, check_float
from planmill.kernels.neighbors.segmented_max import maximize_by_segment
from planmill.kernels.neighbors.segmented_min import minimize_by_segment

METRICS = ("l2", "cosine", "dot")


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows divided by their lengths, float32; a zero row stays zero, no length over- or underflows."""
    x = x.float()
    tiny = torch.finfo(torch.float32).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(tiny)  # a row that holds infinity becomes NaN and matches nothing
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(tiny)


def measure_codes(
    features: torch.Tensor, codes: torch.Tensor, *, metric: str = "l2"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code of each vector and how far it is, without the n x K matrix.

    `argmin_j |x - e_j|`, or the largest cosine similarity or inner product. Codes are screened in 16-bit arithmetic
    with a proven error bound, and every code that could be the nearest is evaluated again in float32 (by direct
    differences for "l2"). Ties go to the lower index.

    Args:
        features: [..., D] with D >= 1, float32, bfloat16 or float16, any strides.
        codes: [K, D], dtype and device of `features`, any strides.
        metric: "l2", "cosine" (of vectors normalised in float32; a zero vector is at distance 1 from all) or "dot".

    Returns:
        distances: [...] float32: |x - e|, 1 - cosine, or the inner product; inf (-inf for "dot") where no code matches.
        indices: [...] int32 into the codes; -1 where no code matches. A vector or a code that holds NaN or infinity
            matches nothing.

    Raises:
        ValueError: wrong rank, different D, D = 0, an unknown metric.
        TypeError: another dtype, or dtypes that differ.

    Source: the assignment of k-means (Lloyd, 1982) and of vector quantisation (van den Oord et al., 2017, eq. 1).
    """
    op = "code_assignment"
    check_choice(op, "metric", metric, METRICS)
    if features.dim() < 1:
        raise ValueError(f"{op}: features must be [..., D], got []")
    if codes.dim() != 2 or features.shape[-1] != codes.shape[1] or codes.shape[1] == 0:
        raise ValueError(
            f"{op}: features must be [..., D] and codes [K, D] with D at least 1, got {list(features.shape)} and "
            f"{list(codes.shape)}"
        )
    check_float(op, "features", features)
    check_alike(op, "codes", codes, "features", features)
    shape = features.shape[:-1]
    x = features.flatten(0, -2) if features.dim() > 1 else features[None]
    bounds = codes.shape[0] * torch.arange(2, dtype=torch.int32, device=codes.device)
    if metric == "l2":
        found = minimize_by_segment(x, codes, bounds)
    elif metric == "dot":
        found = maximize_by_segment(x, codes, bounds)
    else:
        similarity, indices = maximize_by_segment(unit_rows(x), unit_rows(codes), bounds)
        found = 1 - similarity, indices
    return found[0].reshape(shape), found[1].reshape(shape)


def assign_codes(features: torch.Tensor, codes: torch.Tensor, *, metric: str = "l2") -> torch.Tensor:
    """The nearest code of each vector: the indices of `measure_codes`.

    Args:
        features: [..., D] with D >= 1, float32, bfloat16 or float16, any strides.
        codes: [K, D], dtype and device of `features`, any strides.
        metric: "l2", "cosine" or "dot".

    Returns:
        [...] int32 into the codes, ties to the lower index; -1 where no code matches.

    Raises:
        ValueError: wrong rank, different D, D = 0, an unknown metric.
        TypeError: another dtype, or dtypes that differ.

    Source: see `measure_codes`.
    """
    return measure_codes(features, codes, metric=metric)[1]
