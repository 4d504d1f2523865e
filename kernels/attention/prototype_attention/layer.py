"""The blocks of INP-Former: prototypes gathered from an image, and a decoder that knows nothing else of it."""

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.prototype_attention.op import mix_prototypes

EPSILON = 1e-8  # of the published LayerNorms; statistics are float32 in any dtype


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as x."""
        return self.fc2(F.gelu(self.fc1(x)))


class _Projections(nn.Module):
    """`q`, `kv` and `proj`, as in INP-Former's attentions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{type(self).__name__}: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, H, T, C / H]."""
        return x.unflatten(2, (self.heads, x.shape[2] // self.heads)).transpose(1, 2)


def _by_head(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[B, H, M, d] times [H, d, C] -> [B, H, M, C]; matmul would copy the matrices for each sample."""
    batch, heads, count, width = rows.shape
    found = torch.bmm(rows.transpose(0, 1).reshape(heads, batch * count, width), matrices)
    return found.view(heads, batch, count, matrices.shape[2]).transpose(0, 1)


class PrototypeAttention(_Projections):
    """Attention of tokens to prototypes, linear in both: `mix_prototypes` with folded values.

        q = q(x);  k, v = kv(prototypes);  out = concat_h(relu(tau_h cos(q_h, k_h)) v_h) Wo + bo

    Wo is multiplied with the H M values instead of the N tokens: 2 N H M C operations instead of 2 N C^2.
    Parameters: `q`, `kv`, `proj`, `learn_scale`, as INP-Former's `Prototype_Attention`.

    Args:
        dim: C.
        heads: H; C is a multiple of it.

    Shapes: x [B, N, C], prototypes [B, M, C], both normalised -> [B, N, C].

    Source: Luo et al., INP-Former (CVPR 2025), section 3.3.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.learn_scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """What each token takes from the prototypes."""
        dim = self.proj.in_features
        if x.dim() != 3 or x.shape[2] != dim:
            raise ValueError(f"PrototypeAttention: x must be [B, N, {dim}], got {list(x.shape)}")
        if prototypes.dim() != 3 or prototypes.shape[2] != dim:
            raise ValueError(f"PrototypeAttention: prototypes must be [B, M, {dim}], got {list(prototypes.shape)}")
        k, v = (self.split(part) for part in self.kv(prototypes).chunk(2, 2))
        weight = self.proj.weight.T.reshape(self.heads, dim // self.heads, dim)
        table = _by_head(v, weight).flatten(1, 2)  # [B, H M, C]
        q = self.q(x).unflatten(2, (self.heads, dim // self.heads))
        return mix_prototypes(q, k, table, self.learn_scale.flatten(), self.proj.bias)


class PrototypeBlock(nn.Module):
    """A block of INP-Former's decoder: t = attn(norm1(x), norm1(prototypes)); t + mlp(norm2(t)).

    The attention has no residual: nothing of x but its weights reaches the output. Parameters as `Prototype_Block`.

    Args:
        dim: C.
        heads: of the attention.
        ratio: hidden width of the MLP / C.

    Shapes: x [B, N, C], prototypes [B, M, C] -> [B, N, C].

    Source: Luo et al., INP-Former (CVPR 2025), section 3.3.
    """

    def __init__(self, dim: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPSILON), nn.LayerNorm(dim, EPSILON)
        self.attn, self.mlp = PrototypeAttention(dim, heads), Mlp(dim, int(dim * ratio))

    def forward(self, x: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """The tokens, told by the prototypes."""
        dim = self.norm1.normalized_shape[0]
        for name, tokens in (("x", x), ("prototypes", prototypes)):
            if tokens.dim() != 3 or tokens.shape[2] != dim:
                raise ValueError(f"PrototypeBlock: {name} must be [B, N, {dim}], got {list(tokens.shape)}")
        t = self.attn(self.norm1(x), self.norm1(prototypes))
        return t + self.mlp(self.norm2(t))


class _Pooling(_Projections):
    """Few queries over many tokens: keys and values of the tokens are never made.

    softmax(<q_hm, Wk_h y_n + bk_h> d^-0.5) = softmax(<Wk_h^T q_hm, y_n> d^-0.5): the bias is the same for all tokens.
    sum_n P (Wv_h y_n + bv_h) = Wv_h (sum_n P y_n) + bv_h: the rows of P sum to 1.
    """

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batch, count, dim = x.shape
        width = dim // self.heads
        key, value = self.kv.weight.view(2, self.heads, width, dim).unbind()
        rows = _by_head(self.split(self.q(x)), key).reshape(batch, 1, self.heads * count, dim)
        pooled = F.scaled_dot_product_attention(rows, y[:, None], y[:, None], scale=width**-0.5)  # y is read once
        found = _by_head(pooled.view(batch, self.heads, count, dim), value.transpose(1, 2))
        found = found + self.kv.bias[dim:].view(self.heads, 1, width)
        return self.proj(found.transpose(1, 2).reshape(batch, count, dim))


class PrototypeExtractor(nn.Module):
    """INP-Former's extractor: learned tokens gather the prototypes of an image.

        p1 = p + attn(norm1(p), norm1(y));  p1 + mlp(norm2(p1)), attn a softmax attention of p to y

    With 72 rows of queries (12 heads, 6 prototypes) the projections are moved to the queries' side:
    4 N C^2 operations become 4 * 72 N C. Parameters as `Aggregation_Block`; the tokens p are the model's own.

    Args:
        dim: C.
        heads: H; C is a multiple of it.
        ratio: hidden width of the MLP / C.

    Shapes: prototypes [M, C] (for every sample) or [B, M, C], y [B, N, C] with N at least 1 -> [B, M, C].

    Source: Luo et al., INP-Former (CVPR 2025), section 3.2; moving the projections is ours.
    """

    def __init__(self, dim: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPSILON), nn.LayerNorm(dim, EPSILON)
        self.attn, self.mlp = _Pooling(dim, heads), Mlp(dim, int(dim * ratio))

    def forward(self, prototypes: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The prototypes of each image."""
        dim = self.norm1.normalized_shape[0]
        if y.dim() != 3 or y.shape[2] != dim:
            raise ValueError(f"PrototypeExtractor: y must be [B, N, {dim}], got {list(y.shape)}")
        if prototypes.dim() not in (2, 3) or prototypes.shape[-1] != dim:
            raise ValueError(f"PrototypeExtractor: prototypes must be [M, {dim}], got {list(prototypes.shape)}")
        p = prototypes.expand(y.shape[0], -1, -1)
        p = p + self.attn(self.norm1(p), self.norm1(y))
        return p + self.mlp(self.norm2(p))
