"""MatchingPursuit: the encoder and decoder of a matching-pursuit sparse autoencoder."""

import torch
from torch import nn

from planmill.kernels.routing.matching_pursuit.op import pursue_matches
from planmill.kernels.routing.sparse_decoding import decode_sparsely


class Atoms(nn.Module):
    """The dictionary's parameter under its published name; rows are divided by their length where they are used."""

    def __init__(self, concepts: int, channels: int) -> None:
        super().__init__()
        self._weights = nn.Parameter(torch.empty(concepts, channels))
        nn.init.xavier_uniform_(self._weights)

    def forward(self) -> torch.Tensor:
        """Unit rows [M, D]; the length has 1e-8 added, as published."""
        return self._weights / (torch.linalg.vector_norm(self._weights, dim=1, keepdim=True) + 1e-8)


class MatchingPursuit(nn.Module):
    """Sparse autoencoder by matching pursuit, weight-compatible with `MpSAE` of overcomplete (`dictionary._weights`).

    A published state dict may hold an `encoder`, which matching pursuit does not use; it is left out when loading.

    Args:
        channels: D.
        concepts: M, the number of atoms.
        steps: K.
        pre_bias: a learned bias [D], subtracted before the pursuit and added after it; the published model has none.

    Shapes: x [..., D] -> codes (values, indices) [..., K] and reconstruction [..., D].

    Source: as `pursue_matches`.
    """

    def __init__(self, channels: int, concepts: int, steps: int = 16, *, pre_bias: bool = False) -> None:
        super().__init__()
        self.steps = steps
        self.dictionary = Atoms(concepts, channels)
        self.bias = nn.Parameter(torch.zeros(channels)) if pre_bias else None

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values [..., K], indices [..., K] and residual [..., D] of x [..., D]."""
        return self._pursue(x, self.dictionary())

    def _pursue(self, x: torch.Tensor, atoms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x if self.bias is None else x - self.bias
        values, indices, residual = pursue_matches(x.flatten(0, -2), atoms, self.steps)
        shape = x.shape[:-1]
        return values.unflatten(0, shape), indices.unflatten(0, shape), residual.unflatten(0, shape)

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., D] of codes [..., K]."""
        return self._decode(values, indices, self.dictionary())

    def _decode(self, values: torch.Tensor, indices: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
        rows = decode_sparsely(values.flatten(0, -2), indices.flatten(0, -2), atoms, self.bias)
        return rows.unflatten(0, values.shape[:-1])

    def forward(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Codes (values, indices) and reconstruction."""
        atoms = self.dictionary()
        values, indices, _ = self._pursue(x, atoms)
        return (values, indices), self._decode(values, indices, atoms)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + "encoder.")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Settings."""
        return f"steps={self.steps}"
