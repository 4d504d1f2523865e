"""Masks of the patches that resemble a prompt patch (MMC), and the quality of every threshold in one pass."""

from planmill.kernels.neighbors.similarity_threshold.threshold import mask_similar, sweep_thresholds

__all__ = ["mask_similar", "sweep_thresholds"]
