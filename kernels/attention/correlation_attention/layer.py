"""CorrelationAttention, in place of a CLIP block's attention, and the block of two streams around it."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.correlation_attention.op import attend_in_two_streams
from planmill.kernels.attention.correlation_attention.result import Streams
from planmill.kernels.attention.similarity_attention import attend_by_similarity


class CorrelationAttention(nn.Module):
    """Attention of a trained transformer, and beside it attention of its tokens with those alike.

        q, k, v = heads of qkv(x);  new = proj(attention by `maps`);  original = proj(softmax(q k^T scale) v)

    Parameters have the names of CLIP Surgery's `Attention` and Crane's `SelfCorAttention`: `qkv` and `proj`. CLIP
    Surgery takes maps="vv" in the last 6 blocks, Crane "qq+kk+vv" in the last 19 of 24.

    Args:
        dim: C.
        heads: H; C is a multiple of it.
        maps: see `attend_by_correlation`.
        bias: whether `qkv` has a bias.
        scale: of the scores; (C / H)^-0.5 if None.

    Shapes: x [B, N, C] -> new, original [B, N, C], dtype of x. Samples of a batch do not depend on each other.

    Source: Li et al., "CLIP Surgery" (2023), section 3.2; Salehi et al., "Crane" (2025), E-Attn and D-Attn.
    """

    def __init__(
        self, dim: int, heads: int, *, maps: str = "qq+kk+vv", bias: bool = True, scale: float | None = None
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"CorrelationAttention: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads, self.maps, self.scale = heads, maps, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def from_attention(cls, source: nn.Module, *, maps: str = "qq+kk+vv") -> "CorrelationAttention":
        """The layer with the weights of a trained attention; `proj` and a fused `qkv` are shared, not copied.

        Args:
            source: torch's `nn.MultiheadAttention` (OpenAI's CLIP, open_clip), a module with `qkv` and `proj` (timm,
                CLIP Surgery, Crane), or one with `q_proj`, `k_proj`, `v_proj` and `out_proj` (transformers' CLIP).
            maps: see `attend_by_correlation`.

        Raises:
            ValueError: none of these, or one that does more: norms of q and k, keys of another width.
        """
        weight, bias, proj, heads = _read(source)
        scale = getattr(source, "scale", None)
        dim = weight.shape[1]
        if isinstance(scale, float) and math.isclose(scale, (dim // heads) ** -0.5):
            scale = None
        with torch.device("meta"):
            layer = cls(dim, heads, maps=maps, bias=bias is not None, scale=scale)
        layer.qkv.weight, layer.proj = weight, proj
        if bias is not None:
            layer.qkv.bias = bias
        return layer.train(source.training)

    def forward(self, x: torch.Tensor) -> Streams:
        """Both results of the normalised tokens `x` of the original stream."""
        if x.dim() != 3 or x.shape[2] != self.proj.in_features:
            raise ValueError(f"CorrelationAttention: x must be [B, N, {self.proj.in_features}], got {list(x.shape)}")
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind()
        found = attend_in_two_streams(q, k, v, maps=self.maps, scale=self.scale)
        return Streams(*(self.proj(out.transpose(1, 2).reshape(x.shape)) for out in found))

    def attend_from_features(
        self, x: torch.Tensor, features: torch.Tensor, *, grid: tuple[int, int] | None = None, beta: float = 1.2,
        gamma: float = 3.0, batch_coupled: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Values of this layer, mixed as the features of another model are alike: Crane's D-Attn.

        Args:
            x: [B, 1 + h * w, C], the normalised tokens of the original stream that enter this layer, class token first.
            features: [B, D, H, W] of a DINO model.
            grid: (h, w); of a square if None. Values are brought to (H, W) by bilinear interpolation.
            beta, gamma, batch_coupled: see `attend_by_similarity`.

        Returns:
            [B, H * W, C].

        Raises:
            ValueError: wrong rank, or tokens that are not the grid and a class token.
        """
        op = "CorrelationAttention"
        if x.dim() != 3 or features.dim() != 4:
            raise ValueError(
                f"{op}: x must be [B, 1 + h * w, C] and features [B, D, H, W], got {list(x.shape)} and "
                f"{list(features.shape)}"
            )
        side = math.isqrt(x.shape[1] - 1) if grid is None else 0
        height, width = grid or (side, side)
        if height * width != x.shape[1] - 1:
            raise ValueError(f"{op}: x must be [B, 1 + {height} * {width}, C] with this grid, got {list(x.shape)}")
        dim = self.proj.in_features
        bias = self.qkv.bias[2 * dim :] if self.qkv.bias is not None else None
        values = F.linear(x[:, 1:], self.qkv.weight[2 * dim :], bias)
        if (height, width) != tuple(features.shape[2:]):
            image = values.transpose(1, 2).unflatten(2, (height, width))
            image = F.interpolate(image.float(), features.shape[2:], mode="bilinear", align_corners=False)
            values = image.flatten(2).transpose(1, 2).to(x.dtype)
        rows = features.flatten(2).transpose(1, 2)
        return self.proj(attend_by_similarity(rows, values, beta=beta, gamma=gamma, batch_coupled=batch_coupled))

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.proj.in_features}, heads={self.heads}, maps={self.maps!r}"


def _read(source: Any) -> tuple[nn.Parameter, nn.Parameter | None, nn.Linear, int]:
    """Weight and bias of the three projections behind one another, the output's, and the number of heads."""
    op = "CorrelationAttention.from_attention"
    if isinstance(source, nn.MultiheadAttention):
        if source.in_proj_weight is None or source.bias_k is not None or source.add_zero_attn:
            raise ValueError(f"{op}: keys and values must have the width of the queries, and no bias rows")
        return source.in_proj_weight, source.in_proj_bias, source.out_proj, source.num_heads
    if hasattr(source, "qkv") and hasattr(source, "proj"):
        for name in ("q_norm", "k_norm", "norm"):
            if not isinstance(getattr(source, name, nn.Identity()), nn.Identity):
                raise ValueError(f"{op}: {type(source).__name__} has a {name}, which this layer does not")
        return source.qkv.weight, source.qkv.bias, source.proj, source.num_heads
    if all(hasattr(source, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")):
        parts = [source.q_proj, source.k_proj, source.v_proj]
        weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        return weight, nn.Parameter(torch.cat(biases)) if len(biases) == 3 else None, source.out_proj, source.num_heads
    raise ValueError(f"{op}: source must hold in_proj_weight, qkv or q_proj, got {type(source).__name__}")


class CorrelationBlock(nn.Module):
    """A transformer block of two streams around a `CorrelationAttention`.

        a = attention(norm1(original));  new <- new + a.new
        original <- original + a.original;  original <- original + mlp(norm2(original))

    Both results come from the original stream, and the new one has no MLP. The first such block of a model takes a
    tensor: both streams start from it. At the end CLIP Surgery takes the class token from the original stream.

    Args:
        attention, norm1, norm2, mlp: of the trained block, the attention by `CorrelationAttention.from_attention`.

    Shapes: x [B, N, C], or Streams of such -> Streams.

    Source: as `CorrelationAttention`.
    """

    def __init__(self, attention: CorrelationAttention, norm1: nn.Module, norm2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2, self.mlp = attention, norm1, norm2, mlp

    def forward(self, x: torch.Tensor | Streams) -> Streams:
        """Both streams, one block further."""
        streams = Streams(x, x) if isinstance(x, torch.Tensor) else x
        found = self.attention(self.norm1(streams.original))
        original = streams.original + found.original
        return Streams(streams.new + found.new, original + self.mlp(self.norm2(original)))
