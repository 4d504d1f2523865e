"""Classifiers fitted in closed form on frozen features, each of which is one Linear."""

from planmill.kernels.moments.linear_heads.base import LinearHead
from planmill.kernels.moments.linear_heads.gaussian import GaussianHead, NaiveBayesHead
from planmill.kernels.moments.linear_heads.prototypes import (
    CentroidHead,
    CosineHead,
    VonMisesFisherHead,
    calibrate_prototypes,
    equiangular_vectors,
    simplex_vectors,
)

__all__ = [
    "CentroidHead",
    "CosineHead",
    "GaussianHead",
    "LinearHead",
    "NaiveBayesHead",
    "VonMisesFisherHead",
    "calibrate_prototypes",
    "equiangular_vectors",
    "simplex_vectors",
]
