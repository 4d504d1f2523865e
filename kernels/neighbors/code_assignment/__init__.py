"""The nearest code of a codebook for each vector."""

from planmill.kernels.neighbors.code_assignment.assignment import assign_codes, measure_codes

__all__ = ["assign_codes", "measure_codes"]
