"""LoraMix: a linear layer whose low-rank adapters are mixed by weights of each sample."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from planmill.kernels.routing.lora_mixture.op import mix_adapters


class LoraMix(nn.Module):
    """`y = x W^T + b + scale * sum over i of omega[b, i] * B_i A_i x`, adapters and base in one pass.

    With two adapters this is PETALface's layer: `layer(x, alpha)` with one number a sample means
    omega = (1 - alpha, alpha). There alpha = 0.5 + (quality - threshold), quality a score of the image; it may leave
    [0, 1], and whether a high score means a good image is the caller's business. Windows of one image, one after
    the other as Swin cuts them, share the image's weights: x [B * windows, N, I] goes with omega [B, n].

    Dropout on the adapters' outputs, which the published code has in training, is not part of it.

    Args:
        inputs, outputs: I, O.
        adapters, rank: n, r.
        bias: whether the base has one.
        scale: factor of all adapters.

    A new layer's `up` is zero, as is usual: it computes its base alone.

    Shapes: x [M, ..., I], omega [B, n] or alpha [B] float, M a multiple of B -> [M, ..., O].

    Source: PETALface (Narayan et al., WACV 2025), and its public code.
    """

    def __init__(
        self, inputs: int, outputs: int, adapters: int = 2, rank: int = 8, *, bias: bool = True, scale: float = 1.0
    ) -> None:
        super().__init__()
        base = nn.Linear(inputs, outputs, bias=bias)
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.down = nn.Parameter(torch.randn(adapters, rank, inputs) / math.sqrt(max(rank, 1)))
        self.up = nn.Parameter(torch.zeros(adapters, rank, outputs))

    @classmethod
    def from_linear(
        cls, base: nn.Linear, adapters: Sequence[tuple[torch.Tensor, torch.Tensor]], *, scale: float = 1.0
    ) -> "LoraMix":
        """A base layer and the adapters' weights, pairs (A [r, I], B [O, r]) as linear layers hold them.

        The base's parameters are shared, not copied; the adapters are copied. PETALface: `scale` 1; the first adapter
        has the weight 1 - alpha, the second alpha.
        """
        if not adapters:
            raise ValueError("LoraMix: adapters must hold a pair (A, B) at least, got none")
        rank = adapters[0][0].shape[0]
        for i, (a, b) in enumerate(adapters):
            if tuple(a.shape) != (rank, base.in_features) or tuple(b.shape) != (base.out_features, rank):
                needed = f"[{rank}, {base.in_features}] and [{base.out_features}, {rank}]"
                raise ValueError(f"LoraMix: adapter {i} must be {needed}, got {list(a.shape)} and {list(b.shape)}")
        with torch.device("meta"):
            layer = cls(
                base.in_features, base.out_features, len(adapters), rank, bias=base.bias is not None, scale=scale
            )
        layer.weight, layer.bias = base.weight, base.bias
        layer.down = nn.Parameter(torch.stack([a.detach() for a, _ in adapters]).to(base.weight.dtype))
        layer.up = nn.Parameter(torch.stack([b.detach().T for _, b in adapters]).to(base.weight.dtype).contiguous())
        return layer

    def forward(self, x: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
        """`omega`: [B, n], or [B] alpha of two adapters."""
        return mix_adapters(x, self.weight, self.bias, self.down, self.up, self._weights(omega), scale=self.scale)

    def _weights(self, omega: torch.Tensor) -> torch.Tensor:
        if omega.dim() != 1:
            return omega.float()
        if self.down.shape[0] != 2:
            raise ValueError(f"LoraMix: alpha [B] is for two adapters, got {self.down.shape[0]}; give omega [B, n]")
        return torch.stack([1 - omega.float(), omega.float()], 1)

    @torch.no_grad()
    def merge(self, omega: torch.Tensor | float) -> nn.Linear:
        """The plain linear layer for weights that do not change: omega [n], or alpha of two adapters.

        The sum is made in float64 and rounded once to the dtype of the weights.
        """
        given = torch.as_tensor(omega, device=self.weight.device)
        weights = self._weights(given[None])[0].double()
        if weights.shape != self.down.shape[:1]:
            raise ValueError(f"LoraMix: omega must be [{self.down.shape[0]}], got {list(given.shape)}")
        part = torch.einsum("n,nro,nri->oi", weights, self.up.double(), self.down.double())
        with torch.device("meta"):
            merged = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        merged.weight = nn.Parameter((self.weight.double() + self.scale * part).to(self.weight.dtype))
        if self.bias is not None:
            merged.bias = nn.Parameter(self.bias.clone())
        return merged

    def extra_repr(self) -> str:
        """The settings."""
        n, rank, inputs = self.down.shape
        return f"{inputs}, {self.weight.shape[0]}, adapters={n}, rank={rank}, scale={self.scale}"
