"""Greedy complete-link groups of a dozen points, in the order of their arrival."""

import math

import torch

from planmill.kernels.common.checks import check_rank

OP = "densest_cluster"


def pick_densest(points: torch.Tensor, coverage: torch.Tensor, *, reach: float = 14.0) -> int:
    """The point to trust among predictions of several views: the best covered one of the largest group.

    Points are taken in order; a point joins the first group in which it is within `reach` (the larger coordinate
    difference) of every member. The group with the largest `size + mean(coverage) / 1000` wins, the larger group and
    then the earlier one on ties; of its members the one with the highest coverage, the earliest on ties.

    Args:
        points: [n, 2], any real dtype: x and y in pixels.
        coverage: [n], any real dtype; NaN counts as 0.
        reach: in pixels, at least 0.

    Returns:
        The index of the point; -1 where n = 0: use the prediction of the full image.

    Raises:
        ValueError: wrong rank or length, reach below 0.
        TypeError: complex or bool tensors.

    Source: MVP (multi-view prediction for GUI grounding), behaviour of the published code: it returns a member, where
        the abstract speaks of a centroid. Quadratic in n, which is at most 11 there: plain Python on the CPU.
    """
    check_rank(OP, "points", points, 2, "[n, 2]")
    if points.shape[1] != 2 or coverage.shape != points.shape[:1]:
        raise ValueError(
            f"{OP}: points must be [n, 2] and coverage [n], got {list(points.shape)} and {list(coverage.shape)}"
        )
    for name, tensor in (("points", points), ("coverage", coverage)):
        if tensor.dtype is torch.bool or tensor.dtype.is_complex:
            raise TypeError(f"{OP}: {name} must be real numbers, got {tensor.dtype}")
    if not reach >= 0:
        raise ValueError(f"{OP}: reach must be at least 0 pixels, got {reach}")
    where: list[list[float]] = points.tolist()
    worth: list[float] = [0.0 if math.isnan(c) else c for c in coverage.tolist()]
    groups: list[list[int]] = []
    for i, (x, y) in enumerate(where):
        for group in groups:
            if all(max(abs(x - where[j][0]), abs(y - where[j][1])) <= reach for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    if not groups:
        return -1
    best = max(groups, key=lambda group: (len(group) + sum(worth[j] for j in group) / len(group) / 1000, len(group)))
    return max(best, key=lambda j: worth[j])
