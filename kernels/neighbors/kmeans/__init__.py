"""k-means."""

from planmill.kernels.neighbors.kmeans.layer import KMeans
from planmill.kernels.neighbors.kmeans.op import fit_kmeans
from planmill.kernels.neighbors.kmeans.result import KMeansResult

__all__ = ["KMeans", "KMeansResult", "fit_kmeans"]
