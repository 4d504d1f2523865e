"""kmeans: schema, shape rule and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.kmeans.cases import cases, compare
from planmill.kernels.neighbors.kmeans.reference import kmeans_reference
from planmill.kernels.neighbors.kmeans.result import KMeansResult
from planmill.kernels.neighbors.kmeans.start import draw_rows, spread_rows
from planmill.kernels.neighbors.knn.portable import scale_of

SPEC = OpSpec(
    schema=(
        "kmeans(Tensor features, Tensor centers, int iterations, float least, bool relocate)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    outputs=lambda features, centers, iterations, least, relocate: [
        (tuple(centers.shape), torch.float32),
        ((features.shape[0],), torch.float32),
        ((features.shape[0],), torch.int32),
        ((1,), torch.int32),
    ],
    reference=kmeans_reference,
    no_portable="it fits centres, before there is a plan",
    cases=cases,
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
    differentiable=False,
)
_op, _call = register(SPEC)

OP = "kmeans"
STARTS = {"k-means++": spread_rows, "random": draw_rows}
POLICIES = ("relocate", "keep")


def first_centers(features: torch.Tensor, clusters: int, start: str | torch.Tensor, seed: int) -> torch.Tensor:
    """The centres [K, D] float32 before the first iteration."""
    if isinstance(start, torch.Tensor):
        if list(start.shape) != [clusters, features.shape[1]]:
            raise ValueError(f"{OP}: start must be {[clusters, features.shape[1]]}, got {list(start.shape)}")
        if not bool(start.isfinite().all()):
            raise ValueError(f"{OP}: start holds NaN or infinity")
        return start.detach().float().to(features.device)
    check_choice(OP, "start", start, tuple(STARTS))
    return features[STARTS[start](features, clusters, torch.Generator().manual_seed(seed))]


@torch.no_grad()
def fit_kmeans(
    features: torch.Tensor,
    clusters: int,
    *,
    start: str | torch.Tensor = "k-means++",
    empty: str = "relocate",
    iterations: int = 300,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> KMeansResult:
    """Centres that minimise the sum of squared distances, by Lloyd's iteration from one start.

    `labels_i = argmin_j |x_i - c_j|`, `c_j = mean of x_i with labels_i = j`, until no label changes, or the squared
    distance that all centres moved is at most `tolerance` times the mean variance of the channels. Distances are those
    of float32 differences, means are sums in float64: data far from the origin loses nothing. On a CPU a row is left
    out of a round where bounds prove that its label stays: the result is that of assigning every row in every round,
    bit for bit, whatever the number of threads. On a GPU each round asks the device whether to go on.

    Args:
        features: [n, D], float32, bfloat16 or float16, any strides; read as float32.
        clusters: K, 1 to n.
        start: "k-means++" (each row by its squared distance from those chosen, the best of 2 + floor(ln K) draws),
            "random" (distinct rows), or the first centres [K, D].
        empty: what a cluster without rows becomes: "relocate", the row farthest from its centre, which leaves its own
            cluster (as scikit-learn does); "keep", where it was (as anomalib does). A cluster whose last row was
            relocated stays where it was.
        iterations: at most; at least 1.
        tolerance: 0: until no label changes.
        seed: of the start.

    Returns:
        A KMeansResult whose labels are those of its centres, ties to the lower index.

    Raises:
        ValueError: wrong shapes, D = 0, K outside 1 to n, a row that holds NaN or infinity, an unknown start or policy,
            iterations below 1, a negative tolerance.
        TypeError: another dtype.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Arthur, Vassilvitskii, "k-means++", SODA 2007.
    """
    check_rank(OP, "features", features, 2, "[n, D]")
    check_float(OP, "features", features)
    check_choice(OP, "empty", empty, POLICIES)
    if features.shape[1] == 0:
        raise ValueError(f"{OP}: features must be [n, D] with D at least 1, got {list(features.shape)}")
    if not 1 <= clusters <= features.shape[0]:
        raise ValueError(f"{OP}: clusters must be from 1 to the number of rows {features.shape[0]}, got {clusters}")
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"{OP}: needs iterations of at least 1 and a tolerance from 0, got {iterations} and {tolerance}"
        )
    check_int32_range(OP, "features", features.shape[0])
    x = features.float()
    if not bool(x.isfinite().all()):
        row = int(x.isfinite().all(1).int().argmin())
        raise ValueError(f"{OP}: features hold NaN or infinity in row {row}")
    size = scale_of(x)  # squares stay in range, and no bit of a normal number changes
    x = x / size
    centers = first_centers(x, clusters, start, seed)
    if isinstance(start, torch.Tensor):
        centers = centers / size
    least = tolerance * float(x.var(0, correction=0).double().mean()) if tolerance > 0 else 0.0
    found = (_op if is_compiling() else _call)(x, centers, iterations, least, empty == "relocate")
    centers, distances, labels, rounds = found
    inertia = distances.double().square().sum() * size.double().square()
    return KMeansResult(centers * size, labels, float(inertia), int(rounds))
