"""State spaces: the selective scan of Mamba and its mixer, and the final state of a linear recurrence."""

from planmill.kernels.attention.state_space.layer import LinearRecurrence, MambaMixer
from planmill.kernels.attention.state_space.recurrence import reach_final_state
from planmill.kernels.attention.state_space.scan import scan_selectively

__all__ = ["LinearRecurrence", "MambaMixer", "reach_final_state", "scan_selectively"]
