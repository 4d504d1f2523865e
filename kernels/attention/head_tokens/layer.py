"""HeadTokenAttention: softmax attention with a token for each head, folded into the class token (DHVT's HI-MHSA)."""

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_alike, check_float, check_rank

OP = "make_head_tokens"


def make_head_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """A token for each head, from the mean of the tokens in the channels of that head.

    m[b, j] = mean over n of x[b, n, head j]
    t[b, j] = gelu(LayerNorm over each head of (W m[b, j] + b)) + positions[j]

    Args:
        x: [B, N, C], float32, bfloat16 or float16, any strides; N at least 1. All tokens count, the class token too.
        weight, bias: [C, d] and [C], dtype of x, d = C / H: W and b, shared by the heads.
        norm_weight, norm_bias: [d], dtype of x; eps 1e-5.
        positions: [H, C] or [1, H, C], dtype of x.

    Returns:
        [B, H, C], dtype of x; means are float32 sums.

    Raises:
        ValueError: wrong rank or shape, another device.
        TypeError: another dtype.

    Source: Lu et al., "Bridging the gap between vision transformers and convolutional neural networks on small
    datasets" (DHVT, NeurIPS 2022), section 3.3, and its public code.
    """
    check_rank(OP, "x", x, 3, "[B, N, C]")
    check_float(OP, "x", x)
    for name, t in (("weight", weight), ("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias),
                    ("positions", positions)):  # fmt: skip
        check_alike(OP, name, t, "x", x)
    channels, heads = x.shape[2], positions.shape[-2] if positions.dim() > 1 else 0
    width = channels // max(heads, 1)
    if heads == 0 or channels % heads or positions.numel() != heads * channels:
        raise ValueError(f"{OP}: positions must be [H, {channels}], H a divisor, got {list(positions.shape)}")
    shapes = {"weight": (weight, (channels, width)), "bias": (bias, (channels,))}
    shapes |= {"norm_weight": (norm_weight, (width,)), "norm_bias": (norm_bias, (width,))}
    for name, (t, shape) in shapes.items():
        if t.shape != shape:
            raise ValueError(f"{OP}: {name} must be {list(shape)}, got {list(t.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{OP}: x must hold at least one token, got {list(x.shape)}")
    means = x.mean(1, dtype=torch.float32).to(x.dtype).unflatten(1, (heads, width))
    tokens = F.linear(means, weight, bias).unflatten(2, (heads, width))
    return F.gelu(F.layer_norm(tokens, (width,), norm_weight, norm_bias)).flatten(2) + positions.view(heads, channels)


class HeadTokenAttention(nn.Module):
    """Softmax attention over [x; head tokens], whose results are averaged into the class token.

    Names of the weights are those of DHVT's `HI_Attention`: `qkv`, `proj`, `ht_proj`, `ht_norm`, `pos_embed`. As
    published,

        cls_out = Wo(a_cls) + bo + mean over j of (Wo(a_j) + bo) = Wo(a_cls + mean over j of a_j) + 2 bo

    so the rows of the head tokens are averaged before the projection, not after, and the result needs no copies to be
    taken apart and put together. Attention is `scaled_dot_product_attention`: there is no kernel to write here.

    Args:
        dim, heads: C, and H heads of C / H channels, which is the number of head tokens too.
        bias: whether qkv has a bias; DHVT's models have it.

    Shapes: x [B, N, C], the class token first -> [B, N, C], dtype of x.

    Source: as of `make_head_tokens`.
    """

    def __init__(self, dim: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"HeadTokenAttention: dim must be a multiple of heads = {heads}, got {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(dim // heads, dim)
        self.ht_norm = nn.LayerNorm(dim // heads)
        self.pos_embed = nn.Parameter(torch.zeros(1, heads, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        tokens = make_head_tokens(
            x, self.ht_proj.weight, self.ht_proj.bias, self.ht_norm.weight, self.ht_norm.bias, self.pos_embed
        )
        count = x.shape[1]
        qkv = self.qkv(torch.cat([x, tokens], 1)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.proj(a[:, :count])
        y[:, 0] += self.proj(a[:, count:].mean(1))
        return y
