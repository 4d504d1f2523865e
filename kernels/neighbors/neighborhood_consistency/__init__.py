"""Consistency of an input with its augmented neighbours (BEYOND): low for adversarial inputs."""

from planmill.kernels.neighbors.neighborhood_consistency.layer import ConsistencyDetector
from planmill.kernels.neighbors.neighborhood_consistency.op import score_consistency

__all__ = ["ConsistencyDetector", "score_consistency"]
