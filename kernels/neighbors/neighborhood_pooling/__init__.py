"""Local neighbourhood aggregation of patch features (LNAMD of MuSc)."""

from planmill.kernels.neighbors.neighborhood_pooling.op import pool_neighborhood

__all__ = ["pool_neighborhood"]
