"""Angles to prototypes, and agreement with a class's reference, in blocks of rows: no [N, K] matrix is kept."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_float, check_rank

BLOCK = 1 << 22  # scores held at a time


class PrototypeAngles(NamedTuple):
    """What `compare_prototypes` gives.

    Attributes:
        positive: [N] float32, cosine to the prototype of the label.
        negative: [N] float32, largest cosine to another prototype.
        nearest: [N] int32, its class.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    nearest: torch.Tensor


class AttenuationScore(NamedTuple):
    """What `score_attenuation` gives.

    Attributes:
        logit: [N] float32, the largest one.
        predicted: [N] int32, its class.
        cosine: [N] float32, of [z, z w_k] with the reference of that class; 0 where either is 0.
    """

    logit: torch.Tensor
    predicted: torch.Tensor
    cosine: torch.Tensor


def compare_prototypes(features: torch.Tensor, prototypes: torch.Tensor, labels: torch.Tensor) -> PrototypeAngles:
    """Cosines of features to the prototype of their class and to the nearest other one.

    positive = cos(v, w_y), negative = max over j != y of cos(v, w_j): what face recognition calls the angles of a
    sample's recognizability. How a recognizability index combines them with the distance from the centre of
    unrecognizable samples is not built: the published combination was not verified. That distance is
    1 - cos(v, centre), the `positive` of a call with the centre as prototype 0.

    Args:
        features: [N, d], float32, bfloat16 or float16; scaled to length one here (zero rows stay zero).
        prototypes: [K, d], K at least 2, any float dtype; scaled to length one here.
        labels: [N], int64 or int32, 0 to K - 1.

    Returns:
        A PrototypeAngles. Equal cosines: the lowest class. A NaN cosine is never the largest; NaN only where all are.

    Raises:
        ValueError: wrong ranks or sizes, a label outside 0 to K - 1 (the message names the row).
        TypeError: other dtypes.

    Source: Chen et al., "Recognizability embedding enhancement for very low-resolution face recognition and quality
        estimation" (CVPR 2023), the angles only.
    """
    op = "compare_prototypes"
    _check_features(op, features, "prototypes", prototypes)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{op}: labels must be [{features.shape[0]}] like features, got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    classes = prototypes.shape[0]
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: labels must be from 0 to {classes - 1}, got {int(labels[row])} in row {row}")
    unit = F.normalize(prototypes.float(), dim=1)
    found = []
    for rows, y in zip(_blocks(features, classes), _blocks(labels, classes), strict=True):
        cosines = F.normalize(rows.float(), dim=1) @ unit.T
        own = y.long()[:, None]
        positive = cosines.gather(1, own)[:, 0]
        found.append((positive, *_largest(cosines.scatter(1, own, -torch.inf))))
    positive, negative, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return PrototypeAngles(positive, negative, nearest)


def score_attenuation(features: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor) -> AttenuationScore:
    """How much a feature, before and after its predicted class's weights, looks like that class.

    With k = argmax z w^T: the cosine of [z, z w_k] with the reference r_k of class k, such as the mean of the same
    vectors over correctly classified training rows. This is the primitive of open-set scores of the COSTARR kind; how
    COSTARR turns it into a probability was not verified and is not built.

    Args:
        features: z [N, d], float32, bfloat16 or float16: what the last linear layer is given.
        weight: [K, d], K at least 2, any float dtype.
        reference: [K, 2 d], any float dtype.

    Returns:
        An AttenuationScore. Equal logits: the lowest class. A NaN logit is never the largest; NaN only where all are.

    Raises:
        ValueError: wrong ranks or sizes.
        TypeError: other dtypes.

    Source: the abstract of Rabinowitz et al., "COSTARR: consolidated open set technique with attenuation for robust
        recognition" (2025).
    """
    op = "score_attenuation"
    _check_features(op, features, "weight", weight)
    classes, d = weight.shape
    if reference.shape != (classes, 2 * d) or not reference.is_floating_point():
        raise ValueError(f"{op}: reference must be a float [{classes}, {2 * d}], got {list(reference.shape)}")
    w, r = weight.float(), reference.float()
    found = []
    for rows in _blocks(features, max(classes, 4 * d)):
        z = rows.float()
        logit, predicted = _largest(z @ w.T)
        chosen = predicted.long()
        attenuated, of_class = z * w[chosen], r[chosen]
        dot = (z * of_class[:, :d]).sum(1) + (attenuated * of_class[:, d:]).sum(1)
        lengths = (z.square().sum(1) + attenuated.square().sum(1)).sqrt() * of_class.norm(dim=1)
        found.append((logit, predicted, dot / lengths.clamp_min(1e-12)))
    logit, predicted, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    return AttenuationScore(logit, predicted, cosine)


def _check_features(op: str, features: torch.Tensor, name: str, rows: torch.Tensor) -> None:
    check_rank(op, "features", features, 2, "[N, d]")
    check_float(op, "features", features)
    if not rows.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a float dtype, got {rows.dtype}")
    if rows.dim() != 2 or rows.shape[0] < 2 or rows.shape[1] != features.shape[1]:
        raise ValueError(f"{op}: {name} must be [K, {features.shape[1]}] with K at least 2, got {list(rows.shape)}")


def _blocks(x: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    return x.split(max(1, BLOCK // width))


def _largest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row and its lowest index; NaN where no score is a number."""
    known = scores.masked_fill(scores.isnan(), -torch.inf)
    index = known.argmax(1)
    value = known.gather(1, index[:, None])[:, 0]
    unknown = (known == -torch.inf).all(1) & scores.isnan().any(1)
    return torch.where(unknown, torch.nan, value), index.int()
