"""Cosine similarity of prompt patches with all patches, cut at thresholds; prompts taken a few at a time."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_device, check_dtype, check_float, check_rank

OP = "similarity_threshold"
ENTRIES = 1 << 22  # of the similarity that is held at a time


def _check(features: torch.Tensor, prompts: torch.Tensor, thresholds: torch.Tensor, layout: str) -> None:
    check_rank(OP, "features", features, 2, "[P, D]")
    check_float(OP, "features", features)
    if features.shape[1] == 0:
        raise ValueError(f"{OP}: features must be [P, D] with D at least 1, got {list(features.shape)}")
    check_rank(OP, "prompts", prompts, 1, "[m]")
    check_dtype(OP, "prompts", prompts, torch.int32, torch.int64)
    check_rank(OP, "thresholds", thresholds, 1, layout)
    for name, x in (("prompts", prompts), ("thresholds", thresholds)):
        check_device(OP, name, x, "features", features)
    if bool(((prompts < 0) | (prompts >= len(features))).any()):
        raise ValueError(f"{OP}: prompts must be from 0 to {len(features) - 1}, got {prompts.tolist()[:8]}")


def _similarity(features: torch.Tensor, prompts: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the prompts and their similarity [prompts of the slice, P]; NaN where a patch holds NaN or infinity."""
    wide = features.float()
    unit = F.normalize(wide / wide.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny), dim=1)
    step = max(1, ENTRIES // max(len(unit), 1))
    for first in range(0, len(prompts), step):
        part = slice(first, first + step)
        yield part, unit[prompts[part].long()] @ unit.T


@torch.no_grad()
def mask_similar(features: torch.Tensor, prompts: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Which patches resemble each prompt patch by more than its threshold.

    `mask[i, j] = cos(F[p_i], F[j]) > t_i`, in float32, on the patches' own grid: interpolate the features before, or
    the mask after.

    Args:
        features: [P, D] with D >= 1, float32, bfloat16 or float16, any strides: one row per patch.
        prompts: [m], int32 or int64: patches.
        thresholds: [m], any floating dtype, device of `features`.

    Returns:
        [m, P] bool. A zero row has similarity 0 with all; one with NaN or infinity is in no mask, and its own is empty.

    Raises:
        ValueError: wrong rank or length, D = 0, a prompt that is no patch.
        TypeError: another dtype.

    Source: MMC (segmentation by patch prompts): a prompt is a query patch and a threshold; how thresholds are chosen
        could not be read, so they are an argument.
    """
    _check(features, prompts, thresholds, "[m]")
    if len(thresholds) != len(prompts):
        raise ValueError(f"{OP}: thresholds must be [{len(prompts)}] like prompts, got {list(thresholds.shape)}")
    mask = torch.empty(len(prompts), len(features), dtype=torch.bool, device=features.device)
    for part, similarity in _similarity(features, prompts):
        mask[part] = similarity > thresholds[part, None].float()
    return mask


@torch.no_grad()
def sweep_thresholds(
    features: torch.Tensor, prompts: torch.Tensor, thresholds: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Intersection over union of each prompt's mask with a target, for many thresholds in one pass.

    `iou[i, a] = |M_ia and target| / |M_ia or target|`, `M_ia = cos(F[p_i], F) > t_a`: similarities are counted by the
    thresholds that they pass, apart for the target and the rest, and summed up; no mask is made.

    Args:
        features: [P, D] with D >= 1, float32, bfloat16 or float16, any strides.
        prompts: [m], int32 or int64: patches.
        thresholds: [T], any floating dtype, in any order.
        target: [P] bool.

    Returns:
        [m, T] float32; 0 where mask and target are both empty.

    Raises:
        ValueError: wrong rank or length, D = 0, a prompt that is no patch, a threshold that is NaN.
        TypeError: another dtype.

    Source: ours, see `mask_similar`: the best threshold that an oracle could choose.
    """
    _check(features, prompts, thresholds, "[T]")
    if target.shape != features.shape[:1]:
        raise ValueError(f"{OP}: target must be [{len(features)}], got {list(target.shape)}")
    check_dtype(OP, "target", target, torch.bool)
    check_device(OP, "target", target, "features", features)
    if bool(thresholds.isnan().any()):
        raise ValueError(f"{OP}: thresholds must not be NaN")
    ascending, order = thresholds.float().sort()
    bins = len(ascending) + 1
    result = torch.empty(len(prompts), len(ascending), dtype=torch.float32, device=features.device)
    for part, similarity in _similarity(features, prompts):
        passed = torch.searchsorted(ascending, similarity.contiguous()).masked_fill_(similarity.isnan(), 0)
        rows = torch.arange(len(passed), device=features.device)[:, None] * (2 * bins)
        counts = torch.bincount((rows + target * bins + passed).flatten(), minlength=len(passed) * 2 * bins)
        above = counts.view(-1, 2, bins)[:, :, 1:].flip(2).cumsum(2).flip(2)  # with at least so many thresholds passed
        union = target.sum() + above[:, 0]
        result[part, order] = torch.where(union > 0, above[:, 1] / union.clamp_min(1), 0)
    return result
