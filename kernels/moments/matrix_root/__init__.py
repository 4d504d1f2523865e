"""Square roots of covariance matrices: whitening, and covariance pooling."""

from planmill.kernels.moments.matrix_root.layer import CovariancePooling, InstanceWhitening
from planmill.kernels.moments.matrix_root.op import matrix_sqrt, pool_covariance, whiten

__all__ = ["CovariancePooling", "InstanceWhitening", "matrix_sqrt", "pool_covariance", "whiten"]
