"""SoftmaxFreeAttention: SOFT's attention layer, with the parameter names of the published module."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.softmax_free_attention.op import attend_softmax_free

OP = "SoftmaxFreeAttention"


class _Parts(nn.Module):
    """Parameters of the landmarks and of the residual, under their published names."""

    def __init__(self, width: int, heads: int, ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.Qlandmark_op = nn.Conv2d(width, width, ratio, ratio, bias=False)
        self.Qnorm_act = nn.Sequential(nn.LayerNorm(width), nn.GELU())
        if kernel_size:
            self.conv = nn.Conv2d(heads, heads, kernel_size, padding=kernel_size // 2, bias=False, groups=heads)


class SoftmaxFreeAttention(nn.Module):
    """Attention through landmarks: `attend_softmax_free` with learned landmarks and a convolutional residual.

        Q = (x W_q + b_q) d^(-1/4)       V = x W_v + b_v       per head, d = dim / heads; keys are the queries
        L = GELU(LayerNorm(conv(Q)))     one r x r filter bank of stride r, shared by the heads: m = N / r^2 landmarks
        Y = attend_softmax_free(Q, V, L) + one k x k filter per head, shared by its channels, over V
        out = concat(Y) W + b

    Args:
        dim: C.
        heads: H, a divisor of dim.
        ratio: r, of the landmarks.
        kernel_size: k of the residual convolution, odd; 0 for none.
        mode, iterations, ridge, normalize, batch_coupled: as in `attend_softmax_free`.

    Shapes: x [B, N, C], N = H * W tokens in rows -> the same, dtype of x. Samples of a batch do not depend on
    each other unless `batch_coupled`. `load_state_dict` takes the names of the published `SoftmaxFreeAttention`.

    Source: Lu et al., "SOFT: softmax-free transformer with linear complexity" (NeurIPS 2021), section 3, and the
    authors' code. The published layer takes images to be square; this one takes any that `ratio` divides.
    """

    def __init__(
        self, dim: int, heads: int, ratio: int, kernel_size: int = 3, *, mode: str = "newton", iterations: int = 20,
        ridge: float | None = None, normalize: bool = False, batch_coupled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{OP}: heads must divide dim, {dim}, got {heads}")
        if ratio < 1:
            raise ValueError(f"{OP}: ratio must be at least 1, got {ratio}")
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise ValueError(f"{OP}: kernel_size must be odd, or 0 for no convolution, got {kernel_size}")
        self.heads, self.ratio, self.kernel_size = heads, ratio, kernel_size
        self.mode, self.iterations, self.ridge = mode, iterations, ridge
        self.normalize, self.batch_coupled = normalize, batch_coupled
        width = dim // heads
        self.W_q, self.W_v, self.ff = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn = _Parts(width, heads, ratio, kernel_size)

    @classmethod
    def from_soft(
        cls, source: nn.Module | Mapping[str, torch.Tensor], *, iterations: int = 20, normalize: bool = False
    ) -> "SoftmaxFreeAttention":
        """The layer with the weights of the published `SoftmaxFreeAttention`, or of its state dict.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        state = source.state_dict() if isinstance(source, nn.Module) else source
        for name, rank in (("W_q.weight", 2), ("attn.Qlandmark_op.weight", 4)):
            if name not in state or state[name].dim() != rank:
                found = list(state[name].shape) if name in state else ", ".join(sorted(state)) or "nothing"
                raise ValueError(f"{OP}: a state dict must hold {name} of {rank} dimensions, got {found}")
        dim, (width, _, ratio, _) = state["W_q.weight"].shape[1], state["attn.Qlandmark_op.weight"].shape
        kernel = state["attn.conv.weight"].shape[-1] if "attn.conv.weight" in state else 0
        with torch.device("meta"):
            layer = cls(dim, dim // width, ratio, kernel, iterations=iterations, normalize=normalize)
        try:
            layer.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{OP}: {error}") from None
        return layer.requires_grad_()

    def forward(self, x: torch.Tensor, H: int | None = None, W: int | None = None) -> torch.Tensor:
        """Attend within `x`, tokens of an image of H rows of W; without H and W, of a square one."""
        if x.dim() != 3 or x.shape[2] != self.W_q.in_features:
            raise ValueError(f"{OP}: x must be [B, N, {self.W_q.in_features}], got {list(x.shape)}")
        if x.shape[1] == 0:
            return self.ff(x)
        H, W = self._sides(x.shape[1], H, W)
        q, v = self.W_q(x), self.W_v(x)
        scale = (x.shape[2] // self.heads) ** -0.25
        out = attend_softmax_free(
            self._split(q), self._split(v), self._landmarks(q, scale, H, W), scale=scale, mode=self.mode,
            iterations=self.iterations, ridge=self.ridge, normalize=self.normalize, batch_coupled=self.batch_coupled,
        ).transpose(1, 2)  # fmt: skip
        if self.kernel_size:
            out = self._convolve(v, H, W).view(out.shape) + out
        return self.ff(out.reshape(x.shape))

    def _sides(self, tokens: int, H: int | None, W: int | None) -> tuple[int, int]:
        if H is None and W is None:
            H = W = math.isqrt(tokens)
            if tokens != H * W:
                raise ValueError(f"{OP}: x must have H * W tokens: {tokens} are no square, pass H and W")
        H = tokens // W if H is None and W else H
        W = tokens // H if W is None and H else W
        if H is None or W is None or H < 1 or tokens != H * W:
            raise ValueError(f"{OP}: H * W must be the number of tokens, {tokens}, got H={H} and W={W}")
        if H % self.ratio or W % self.ratio:
            raise ValueError(f"{OP}: ratio must divide H and W, got ratio={self.ratio}, H={H}, W={W}")
        return H, W

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _landmarks(self, q: torch.Tensor, scale: float, H: int, W: int) -> torch.Tensor:
        """[B, heads, m, d]: the strided convolution as one product over patches, which no token is in twice."""
        r, weight = self.ratio, self.attn.Qlandmark_op.weight
        patches = q.view(q.shape[0], H // r, r, W // r, r, self.heads, weight.shape[1]).permute(0, 5, 1, 3, 2, 4, 6)
        flat = weight.permute(0, 2, 3, 1).flatten(1)
        sums = F.linear(patches.reshape(q.shape[0], self.heads, (H // r) * (W // r), flat.shape[1]), flat)
        return self.attn.Qnorm_act(sums * scale)

    def _convolve(self, v: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Every head's filter over its channels: a depthwise convolution, channels last as the tokens lie."""
        image = v.transpose(1, 2).unflatten(2, (H, W))
        weight = self.attn.conv.weight.repeat_interleave(v.shape[2] // self.heads, 0)
        out = F.conv2d(image, weight, padding=self.kernel_size // 2, groups=v.shape[2])
        return out.flatten(2).transpose(1, 2).contiguous()

    def extra_repr(self) -> str:
        """The settings."""
        sizes = f"{self.W_q.in_features}, heads={self.heads}, ratio={self.ratio}, kernel_size={self.kernel_size}"
        return f"{sizes}, mode={self.mode!r}"
