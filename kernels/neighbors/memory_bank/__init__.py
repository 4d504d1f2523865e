"""MemoryBank: features of good images, of which few are kept; a new image is judged by its distance from them."""

from planmill.kernels.neighbors.memory_bank.layer import MemoryBank

__all__ = ["MemoryBank"]
