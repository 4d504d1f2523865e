"""Where a feature lies among classes: angles to prototypes, and agreement with what its predicted class looks like."""

from planmill.kernels.moments.class_geometry.functions import (
    AttenuationScore,
    PrototypeAngles,
    compare_prototypes,
    score_attenuation,
)

__all__ = ["AttenuationScore", "PrototypeAngles", "compare_prototypes", "score_attenuation"]
