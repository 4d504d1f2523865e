"""SlowNet, GlobalHyperKernel and LocalHyperKernel: kernels made from coordinates, and layers that use them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.hyper_kernels.products import filter_by_sample, multiply_with_kernel


class SlowNet(nn.Module):
    """A kernel [C, S, S] from coordinates, a multiplicative network of sines:

        h_0 = sin(W_0 c + b_0),    h_i = sin(W_i c + b_i) * (U_i h_{i-1} + a_i) + p_i,    K = W_out h_l + b_out

    with c on a grid over [-1, 1]^2 and p_i a learned number for each position. W_out begins divided by S.

    Args:
        channels: C.
        size: S.
        hidden: width of h.
        layers: l.

    Shapes: nothing -> [C, S, S]; with `modulation` [B, l, hidden], which multiplies the h_i, [B, C, S, S].

    Source: the slow network (MAGNet) of HyperZ.Z.W, from a third party's copy; not verified against the paper.
    """

    grid: torch.Tensor

    def __init__(self, channels: int, size: int, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1)
        self.register_buffer("grid", torch.cartesian_prod(axis, axis), persistent=False)
        self.size = size
        self.filters = nn.ModuleList([nn.Linear(2, hidden) for _ in range(layers + 1)])
        self.linears = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers)])
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(size * size, 1)) for _ in range(layers)])
        self.out = nn.Linear(hidden, channels)
        with torch.no_grad():
            self.out.weight.mul_(1 / size)  # sqrt(1 / positions)

    def forward(self, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """The kernel, or one for each row of `modulation`."""
        h = self.filters[0](self.grid).sin()
        for i, (linear, shift) in enumerate(zip(self.linears, self.shifts, strict=True)):
            h = self.filters[i + 1](self.grid).sin() * linear(h) + shift
            if modulation is not None:
                h = h * modulation[:, i, None]
        return self.out(h).transpose(-1, -2).unflatten(-1, (self.size, self.size))


class GlobalHyperKernel(nn.Module):
    """`multiply_with_kernel` with the kernel of a `SlowNet`, which depends on parameters only.

    Args:
        channels: C.
        size: S of the images.
        hidden, layers: of the slow network.
        twice: as in `multiply_with_kernel`.

    Shapes: z [B, C, S, S] -> the same.

    Source: see `multiply_with_kernel`.
    """

    def __init__(self, channels: int, size: int, *, hidden: int = 16, layers: int = 2, twice: bool = True) -> None:
        super().__init__()
        self.slow, self.twice = SlowNet(channels, size, hidden, layers), twice

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Multiply `z`."""
        return multiply_with_kernel(z, self.slow(), twice=self.twice)


class LocalHyperKernel(nn.Module):
    """A depthwise convolution of z2 with kernels made from z1, then a 1 x 1 mixer and GELU.

        s = FC(reduce(k x k average of z1)),    kernels = SlowNet modulated by gelu(s),    y = gelu(mix(DW(z2))) + bias

    Every sample has kernels of its own. As published, s is averaged over the batch (`batch_mean=True`), so that a
    result depends on the other samples. The published standardisation by batch statistics is left to the caller.

    Args:
        channels: C.
        kernel: k, odd.
        hidden, layers: of the slow network.
        batch_mean: average the modulation over the batch, as published.

    Shapes: z1, z2 [B, C, H, W] -> [B, C, H, W].

    Source: the local operator of HyperZ.Z.W, from a third party's copy; not verified against the paper.
    """

    def __init__(
        self, channels: int, kernel: int = 3, *, hidden: int = 16, layers: int = 2, batch_mean: bool = False
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"LocalHyperKernel: kernel must be odd, got {kernel}")
        self.slow = SlowNet(channels, kernel, hidden, layers)
        self.reduce = nn.Conv2d(channels, 1, 1)
        self.fc = nn.Linear(kernel * kernel, layers * hidden)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.bias = nn.Parameter(torch.zeros(()))
        self.shape, self.batch_mean = (layers, hidden), batch_mean

    def forward(self, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        """Convolve `z2` with kernels made from `z1`."""
        pooled = self.reduce(F.adaptive_avg_pool2d(z1, math.isqrt(self.fc.in_features))).flatten(1)
        if self.batch_mean:
            pooled = pooled.mean(0, keepdim=True)
        kernels = self.slow(F.gelu(self.fc(pooled)).unflatten(1, self.shape))
        filtered = filter_by_sample(z2, kernels.expand(z2.shape[0], -1, -1, -1))
        return F.gelu(self.mix(filtered)) + self.bias
