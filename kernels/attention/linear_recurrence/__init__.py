"""The state that a sequence leaves in a linear time-invariant recurrence."""

from planmill.kernels.attention.linear_recurrence.layer import LinearRecurrence
from planmill.kernels.attention.linear_recurrence.recurrence import reach_final_state

__all__ = ["LinearRecurrence", "reach_final_state"]
