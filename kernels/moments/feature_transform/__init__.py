"""Element-wise transforms of features before prototypes."""

from planmill.kernels.moments.feature_transform.functions import transform_features

__all__ = ["transform_features"]
