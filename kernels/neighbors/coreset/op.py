"""coreset: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_device, check_dtype, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.coreset.cases import cases, compare
from planmill.kernels.neighbors.coreset.reference import coreset_reference

SPEC = OpSpec(
    schema="coreset(Tensor features, Tensor distances, int count, int start) -> Tensor",
    outputs=lambda features, distances, count, start: [((count,), torch.int32)],
    reference=coreset_reference,
    portable="portable:coreset_portable",
    cases=cases,
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
    differentiable=False,
)
_op, _call = register(SPEC)

ROWS_PROJECTED = 8192  # at a time


def choose_coreset(
    features: torch.Tensor,
    count: int,
    *,
    start: int | None = None,
    seed: int = 0,
    projection: int | None = None,
    distances: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows that leave no row far away: greedy k-centre choice, the next one being the row farthest from those chosen.

    c_1 = `start`;  c_{j+1} = argmax_i min_{l <= j} |x_i - c_l|.  The largest distance that is left is at most twice the
    smallest possible one. The choice is that of float64 arithmetic on a CPU and of float32 on a GPU; without a
    projection it depends neither on threads nor on the instruction set.

    Args:
        features: [N, D] with D >= 1, float32, bfloat16 or float16, any strides. Rows that hold NaN or infinity are
            chosen last.
        count: rows to choose, 1 to N.
        start: the first row; None: drawn from `seed`, or with `distances` the farthest.
        seed: of `start` and of the projection; the global generators are left alone.
        projection: width of a random Gaussian projection in which distances are measured instead (scaled so that they
            keep their expected squares); None: none. The product is made in float32, and its rounding may decide
            between rows that are equally far within 1e-6.
        distances: [N] float32: to the nearest of rows chosen before, from elsewhere, in the space of `features`; the
            choice then continues that one. NaN: chosen last. Not with `projection`.

    Returns:
        [count] int32, in the order of choice, all different; of rows equally far the lower index is chosen.

    Raises:
        ValueError: wrong rank, count or start outside the rows, projection < 1, distances of another length.
        TypeError: another dtype.

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985); for patches, Roth et al.,
        "Towards total recall in industrial anomaly detection" (PatchCore, CVPR 2022), section 3.2.
    """
    op = "coreset"
    check_rank(op, "features", features, 2, "[N, D]")
    check_float(op, "features", features)
    rows, width = features.shape
    check_int32_range(op, "features", rows)
    if width == 0:
        raise ValueError(f"{op}: features must be [N, D] with D at least 1, got {list(features.shape)}")
    if not 1 <= count <= rows:
        raise ValueError(f"{op}: count must be from 1 to the {rows} rows of features, got {count}")
    if start is not None and not 0 <= start < rows:
        raise ValueError(f"{op}: start must be from 0 to {rows - 1}, got {start}")
    if distances is not None:
        check_dtype(op, "distances", distances, torch.float32)
        check_device(op, "distances", distances, "features", features)
        if tuple(distances.shape) != (rows,):
            raise ValueError(f"{op}: distances must be [{rows}] like features, got {list(distances.shape)}")
    if projection is not None:
        if projection < 1:
            raise ValueError(f"{op}: projection must be at least 1, got {projection}")
        if distances is not None:
            raise ValueError(f"{op}: distances are of the space of features: not with a projection")
        features = _project(features.detach(), projection, seed)
    if start is None and distances is None:
        start = int(torch.randint(rows, (1,), generator=torch.Generator().manual_seed(seed)))
    given = features.new_empty(0, dtype=torch.float32) if distances is None else distances
    return (_op if is_compiling() else _call)(features, given, count, -1 if start is None else start)


def _project(features: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Float32 [N, width]: features times a Gaussian matrix, whose rounding does not depend on other rows' blocks."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(features.shape[1], width, generator=generator).mul_(width**-0.5).to(features.device)
    out = torch.empty(len(features), width, device=features.device)
    for first in range(0, len(features), ROWS_PROJECTED):
        torch.mm(features[first : first + ROWS_PROJECTED].float(), matrix, out=out[first : first + ROWS_PROJECTED])
    return out
