"""mutual_matching: schema, shape rule, checks and the public functions."""

import math

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_float, check_int32_range
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.mutual_matching.cases import cases, compare
from planmill.kernels.neighbors.mutual_matching.reference import fuse, mutual_matching_reference
from planmill.kernels.neighbors.mutual_matching.result import MutualMatches


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the scores: each reaches one row of a and the row of b nearest to it."""
    *features, weight, weight2, _ = args
    nearest, gradient = outputs[1].long(), grads[0].double()
    with torch.enable_grad():
        a, b, a2, b2 = (x.detach().requires_grad_() for x in features)
        rows_of_a, rows_of_b = (fuse(*x, weight, weight2).nan_to_num() for x in ((a, a2), (b, b2)))
        if rows_of_b.shape[1] == 0:
            return (*(torch.zeros_like(x) for x in features), None, None, None)
        there = nearest.clamp_min(0)[..., None].expand_as(rows_of_a)
        scores = (rows_of_a * rows_of_b.gather(1, there)).sum(-1)
        total = (scores * gradient)[nearest >= 0].sum()
        found = torch.autograd.grad(total, [a, b, a2, b2], allow_unused=True)
    return (
        *(torch.zeros_like(x) if g is None else g.to(x.dtype) for g, x in zip(found, features, strict=True)),
        None, None, None,
    )  # fmt: skip


SPEC = OpSpec(
    schema="mutual_matching(Tensor a, Tensor b, Tensor a2, Tensor b2, float weight, float weight2, float ratio)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=lambda a, b, a2, b2, weight, weight2, ratio: [
        ((a.shape[0], a.shape[1]), torch.float32),
        ((a.shape[0], a.shape[1]), torch.int32),
        ((b.shape[0], b.shape[1]), torch.int32),
        ((a.shape[0], a.shape[1]), torch.int32),
    ],
    reference=mutual_matching_reference,
    cases=cases,
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)
OP = "mutual_matching"


def _check_maps(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dim() not in (2, 3):
        raise ValueError(f"{OP}: a must be [n, D] or [B, n, D], got {list(a.shape)}")
    check_float(OP, "a", a)
    check_alike(OP, "b", b, "a", a)
    if b.dim() != a.dim() or b.shape[:-2] != a.shape[:-2] or b.shape[-1] != a.shape[-1]:
        layout = ", ".join(map(str, (*a.shape[:-2], "m", a.shape[-1])))
        raise ValueError(f"{OP}: b must be [{layout}] like a, got {list(b.shape)}")
    if a.shape[-1] == 0:
        raise ValueError(f"{OP}: a must be [n, D] or [B, n, D] with D at least 1, got {list(a.shape)}")
    check_int32_range(OP, "a", a.shape[-2])
    check_int32_range(OP, "b", b.shape[-2])


def _check_second(a: torch.Tensor, b: torch.Tensor, second: tuple[torch.Tensor, torch.Tensor]) -> None:
    for name, x, first_name, first in (("second[0]", second[0], "a", a), ("second[1]", second[1], "b", b)):
        check_alike(OP, name, x, first_name, first)
        if x.dim() != first.dim() or x.shape[:-1] != first.shape[:-1] or x.shape[-1] == 0:
            layout = ", ".join(map(str, (*first.shape[:-1], "D2")))
            raise ValueError(
                f"{OP}: {name} must be [{layout}] with D2 at least 1, as {first_name}, got {list(x.shape)}"
            )
    if second[0].shape[-1] != second[1].shape[-1]:
        raise ValueError(
            f"{OP}: second must be two maps of one width, got {second[0].shape[-1]} and {second[1].shape[-1]}"
        )


def match_mutually(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    ratio: float | None = None,
) -> MutualMatches:
    """Mutual nearest neighbours of the rows of two feature maps, by cosine, of one or two fused features.

    `S[i, j] = w1^2 cos(a_i, b_j) + w2^2 cos(second_a_i, second_b_j)`: row i of a and row j of b match where j is the
    largest of its row of S and i the largest of its column. That is the nearest neighbour by Euclidean distance of
    rows of length w1 and w2 laid side by side, `|z_i - z_j|^2 = 2 (w1^2 + w2^2 - S[i, j])`. Rows and columns are
    settled from one pass over tiles of the products; the n x m matrix is never stored.

    The products are screened in 8 or 16 bits with a proven error bound, and every pair that could be the best of its
    row or column is evaluated again in float32 by direct differences: the result is exact, also between near
    duplicates. Ties go to the lower index on both sides.

    Args:
        a: [n, D] or [B, n, D], float32, bfloat16 or float16, any strides; any lengths of rows.
        b: [m, D] or [B, m, D], dtype and device of `a`, any strides.
        second: a second feature of the same rows, ([.., n, D2], [.., m, D2]), dtype and device of `a`; None: none.
        weights: (w1, w2), above 0: the lengths that the rows of the two features are brought to; alone, the first
            scales the scores and changes no match. `(alpha ** 0.5, (1 - alpha) ** 0.5)` weighs the cosines by alpha.
        ratio: in (0, 1]: a match stays only where its distance |z_i - z_j| is at most `ratio` times the distance to the
            second nearest, of row i among b and of row j among a; None: no such test.

    Returns:
        MutualMatches(indices, scores, nearest, nearest_back). A row that holds NaN or infinity, or is zero in one of
        its features, has no direction and matches nothing. An entry of a batch does not depend on the others.
        Gradients flow through the scores.

    Raises:
        ValueError: wrong rank, other batch sizes or widths, D = 0, weights or ratio out of range.
        TypeError: another dtype, or dtypes that differ.

    Source: mutual neighbours by cross-check: Lowe (IJCV 2004) for the ratio, taken on both sides as a match has no
    direction; fused features: A Tale of Two Features (Zhang et al., NeurIPS 2023), section 3.3, whose published code
    makes no mutual check and takes `nearest`.
    """
    _check_maps(a, b)
    if second is not None:
        _check_second(a, b, second)
    if not (len(weights) == 2 and all(0 < w < math.inf for w in weights)):
        raise ValueError(f"{OP}: weights must be two numbers above 0, got {weights}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"{OP}: ratio must be above 0 and at most 1, got {ratio}")
    maps: tuple[torch.Tensor, ...] = (a, b, *(second if second is not None else (a[..., :0], b[..., :0])))
    if a.dim() == 2:
        maps = tuple(x[None] for x in maps)
    scores, nearest, back, indices = (_op if is_compiling() else _call)(
        *maps, float(weights[0]), float(weights[1]), 1.0 if ratio is None else float(ratio)
    )
    if a.dim() == 2:
        return MutualMatches(indices[0], scores[0], nearest[0], back[0])
    return MutualMatches(indices, scores, nearest, back)


def list_matches(matches: MutualMatches) -> tuple[torch.Tensor, torch.Tensor]:
    """The mutual matches alone, as a list of pairs in ascending rows of a.

    `pairs[k] = (i, indices[i])` for each i with a match. The number of pairs depends on the values, so this waits for
    the device and does not compile to a fixed shape; what needs one uses `matches.indices`.

    Args:
        matches: what `match_mutually` returned.

    Returns:
        pairs: [M, 2] int32, rows (i, j); of maps with a batch [M, 3], rows (entry, i, j).
        scores: [M] float32, the similarity of each pair.

    Raises:
        Nothing.

    Source: the output of `kornia.feature.match_mnn` and `cv2.BFMatcher(crossCheck=True)`, as two columns.
    """
    where = (matches.indices >= 0).nonzero(as_tuple=True)
    return torch.stack([*(x.int() for x in where), matches.indices[where]], 1), matches.scores[where]
