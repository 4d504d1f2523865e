"""neighbor_rescoring: schema, shape rule, checks and the public function."""

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.neighbor_rescoring.cases import cases
from planmill.kernels.neighbors.neighbor_rescoring.reference import neighbor_rescoring_reference

SPEC = OpSpec(
    schema="neighbor_rescoring(Tensor scores, Tensor descriptors, str neighbors) -> Tensor",
    outputs=lambda scores, descriptors, neighbors: [((scores.shape[0],), torch.float32)],
    reference=neighbor_rescoring_reference,
    cases=cases,
    no_kernel="N x N is small: one float64 product of the descriptors",
)
_op, _call = register(SPEC)


def rescore_by_neighbors(
    scores: torch.Tensor, descriptors: torch.Tensor, neighbors: Sequence[int] = (1, 2, 3)
) -> torch.Tensor:
    """Image scores averaged with those of similar images.

    Scores are scaled to [0, 1] over the set. `W = E E^T`; for each k the score becomes the W-weighted mean over the k
    largest entries of the image's row (itself included; ties to the lower index); the result is the mean over all k.

    Args:
        scores: [N], float32, bfloat16 or float16: one finite score per image.
        descriptors: [N, E], dtype and device of `scores`: one descriptor per image, usually of unit length.
        neighbors: neighbourhood sizes k, each at least 1 (1 is the image itself); a k above N means all images.

    Returns:
        [N] float32 in [0, 1]; all zero when all scores are equal. Negative similarities count as zero, and an image
        with no positive similarity keeps its own score. An image's result depends on the set: that is the method.

    Raises:
        ValueError: wrong rank or length, an empty set, an empty list of sizes or a size below 1.
        TypeError: another dtype, or dtypes that differ.

    Source: MuSc (Li et al., ICLR 2024), section 3.3 (RsCIN). The clamp of negative weights is ours.
    """
    op = "neighbor_rescoring"
    check_rank(op, "scores", scores, 1, "[N]")
    check_rank(op, "descriptors", descriptors, 2, "[N, E]")
    check_float(op, "scores", scores)
    check_alike(op, "descriptors", descriptors, "scores", scores)
    if scores.shape[0] == 0 or descriptors.shape[0] != scores.shape[0]:
        raise ValueError(
            f"{op}: descriptors must be [N, E] with N = {scores.shape[0]} >= 1, got {list(descriptors.shape)}"
        )
    if len(neighbors) == 0 or min(neighbors) < 1:
        raise ValueError(f"{op}: neighbors must be sizes of at least 1, got {list(neighbors)}")
    return (_op if is_compiling() else _call)(scores, descriptors, ",".join(str(k) for k in neighbors))
