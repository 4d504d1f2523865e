"""Images ranked by their local features alone: the exact objective of CANN."""

from planmill.kernels.neighbors.image_ranking.layer import ImageIndex
from planmill.kernels.neighbors.image_ranking.score import score_images

__all__ = ["ImageIndex", "score_images"]
