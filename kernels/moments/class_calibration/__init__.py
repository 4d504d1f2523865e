"""Means and covariances of classes with few rows, drawn towards those of classes with many."""

from planmill.kernels.moments.class_calibration.functions import CalibratedMoments, calibrate_moments

__all__ = ["CalibratedMoments", "calibrate_moments"]
