"""neighborhood_consistency: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_device, check_dtype, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.neighborhood_consistency.cases import cases
from planmill.kernels.neighbors.neighborhood_consistency.reference import neighborhood_consistency_reference

SPEC = OpSpec(
    schema="neighborhood_consistency(Tensor features, Tensor neighbors, Tensor logits, Tensor labels, float weight, "
    "int k) -> Tensor",
    outputs=lambda features, neighbors, logits, labels, weight, k: [((features.shape[0],), torch.float32)],
    reference=neighborhood_consistency_reference,
    cases=cases,
    no_kernel="two products with some fifty rows: the network that makes them costs a million times as much",
)
_op, _call = register(SPEC)


def score_consistency(
    features: torch.Tensor,
    neighbors: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 0.8,
    k: int = 20,
) -> torch.Tensor:
    """How well an input agrees with augmented copies of itself; low for adversarial inputs.

    `r_t = cos(g(x), g(x_t))`, `l_t = c_y(x_t) / |c(x_t)|`, `u_t = weight l_t + (1 - weight) r_t`; the confidence is the
    k-th largest u_t.

    Args:
        features: [B, D], float32, bfloat16 or float16: g(x), a self-supervised representation.
        neighbors: [B, T, D], dtype and device of `features`: g of T augmented copies.
        logits: [B, T, C], likewise: c, a classifier on the copies' representations.
        labels: [B], int32 or int64 from 0 to C - 1: what the model under test calls x.
        weight: of the labels' agreement, 0 to 1.
        k: the rank whose value counts, 1 to T.

    Returns:
        [B] float32 from -1 to 1. A cosine with a zero vector is 0. A neighbour with NaN comes last; the confidence is
        NaN where k reaches such neighbours.

    Raises:
        ValueError: wrong rank or size, k or weight out of range, a label outside 0 to C - 1 (checked on the CPU).
        TypeError: another dtype, or dtypes that differ.

    Source: BEYOND (He et al., "Be your own neighborhood: detecting adversarial examples by the neighborhood relations
        built on self-supervised learning"), as in the published code: 50 neighbours, weight 0.8, k 20.
    """
    op = "neighborhood_consistency"
    check_rank(op, "features", features, 2, "[B, D]")
    check_float(op, "features", features)
    check_rank(op, "neighbors", neighbors, 3, "[B, T, D]")
    check_rank(op, "logits", logits, 3, "[B, T, C]")
    check_alike(op, "neighbors", neighbors, "features", features)
    check_alike(op, "logits", logits, "features", features)
    (batch, width), copies, classes = features.shape, neighbors.shape[1], logits.shape[2]
    if neighbors.shape[0] != batch or neighbors.shape[2] != width:
        raise ValueError(f"{op}: neighbors must be [{batch}, T, {width}] like features, got {list(neighbors.shape)}")
    if logits.shape[:2] != neighbors.shape[:2] or classes == 0:
        raise ValueError(f"{op}: logits must be [{batch}, {copies}, C] with C at least 1, got {list(logits.shape)}")
    if labels.shape != (batch,):
        raise ValueError(f"{op}: labels must be [{batch}], got {list(labels.shape)}")
    check_dtype(op, "labels", labels, torch.int32, torch.int64)
    check_device(op, "labels", labels, "features", features)
    if not 1 <= k <= copies:
        raise ValueError(f"{op}: k must be from 1 to the {copies} neighbors, got {k}")
    if not 0 <= weight <= 1:
        raise ValueError(f"{op}: weight must be from 0 to 1, got {weight}")
    if labels.device.type == "cpu" and not is_compiling() and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"{op}: labels must be from 0 to {classes - 1}, got {labels.tolist()[:8]}")
    return (_op if is_compiling() else _call)(features, neighbors, logits, labels, float(weight), k)
