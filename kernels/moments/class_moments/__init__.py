"""Means of classes and the scatter within them."""

from planmill.kernels.moments.class_moments.op import average_by_class
from planmill.kernels.moments.class_moments.result import ClassMoments

__all__ = ["ClassMoments", "average_by_class"]
