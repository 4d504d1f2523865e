"""IntermediaryMatcher: a gallery whose own intermediaries are averaged once."""

import torch
from torch import nn

from planmill.kernels.neighbors.intermediary_matching.matching import average_intermediaries, match_intermediaries


class IntermediaryMatcher(nn.Module):
    """Similarity of queries to a stored gallery, direct and through intermediaries on both sides.

    Args:
        keys: [m, D], float32, bfloat16 or float16: what finds intermediaries (clothes, in FAIM).
        values: [m, E], dtype of `keys`: what is compared (all but clothes).
        k, temperature: as in `average_intermediaries`.

    Shapes: keys [n, D], values [n, E] -> similarity [n, m] float32.

    Source: see `match_intermediaries`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    means: torch.Tensor
    availability: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, *, k: int = 10, temperature: float = 0.1) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        means, availability = average_intermediaries(
            keys.detach(), keys.detach(), values.detach(), k, temperature=temperature, exclude_self=True
        )
        buffers = {"keys": keys.detach(), "values": values.detach(), "means": means, "availability": availability}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Similarity of queries with keys [n, D] and values [n, E] to the gallery; [n, m]."""
        route = average_intermediaries(keys, self.keys, self.values, self.k, temperature=self.temperature)
        return match_intermediaries(values, self.values, route, (self.means, self.availability))
