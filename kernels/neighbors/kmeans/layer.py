"""KMeans: centres, and the assignment to them."""

import torch
from torch import nn

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.neighbors.code_assignment import measure_codes
from planmill.kernels.neighbors.kmeans.op import fit_kmeans


class KMeans(nn.Module):
    """The nearest of K centres for each vector.

    Args:
        centers: [K, D], float32, bfloat16 or float16; kept as float32.

    Shapes: features [..., D] -> labels [...] int32, -1 for a vector that holds NaN or infinity.

    Source: see `fit_kmeans`.
    """

    centers: torch.Tensor

    def __init__(self, centers: torch.Tensor) -> None:
        super().__init__()
        check_rank("KMeans", "centers", centers, 2, "[K, D]")
        check_float("KMeans", "centers", centers)
        self.register_buffer("centers", centers.detach().float().contiguous())

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        clusters: int,
        *,
        start: str | torch.Tensor = "k-means++",
        empty: str = "relocate",
        iterations: int = 300,
        tolerance: float = 1e-4,
        seed: int = 0,
    ) -> "KMeans":
        """Find the centres; see `fit_kmeans`."""
        found = fit_kmeans(
            features, clusters, start=start, empty=empty, iterations=iterations, tolerance=tolerance, seed=seed
        )
        return cls(found.centers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The index of the nearest centre, [...] int32."""
        return self.measure(features)[1]

    def measure(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance from the nearest centre [...] float32, and its index [...] int32."""
        check_float("KMeans", "features", features)
        return measure_codes(features.float(), self.centers)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"clusters={self.centers.shape[0]}, width={self.centers.shape[1]}"
