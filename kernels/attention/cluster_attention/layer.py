"""ClusterAttention and ClusterSelfAttention: the attention of the Routing Transformer, with its weights."""

from typing import Any

import torch
from torch import nn

from planmill.kernels.attention.cluster_attention.op import attend_in_clusters
from planmill.kernels.attention.cluster_members import choose_members


class Centroids(nn.Module):
    """The centroids of each head, which do not move: [H, C, d], and whether they are those of a trained model."""

    means: torch.Tensor
    initted: torch.Tensor

    def __init__(self, heads: int, clusters: int, width: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.randn(heads, clusters, width))
        self.register_buffer("initted", torch.tensor(False))
        self.ready = False  # `initted` as Python knows it: no call waits for the device to ask

    def set_centroids(self, means: torch.Tensor) -> None:
        """Use `means` [H, C, d] from now on."""
        if means.shape != self.means.shape:
            raise ValueError(f"ClusterAttention: means must be {list(self.means.shape)}, got {list(means.shape)}")
        self.means.copy_(means)
        self.initted.fill_(True)
        self.ready = True

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        initted = state_dict.get(f"{prefix}initted")
        if initted is not None and not initted.is_meta:
            self.ready = bool(initted)

    def forward(self) -> torch.Tensor:
        """The centroids."""
        if not self.ready:
            raise ValueError(
                "ClusterAttention: kmeans.initted must be true, got false: the centroids are random numbers; "
                "load the state dict of a trained model, or call set_centroids"
            )
        return self.means


class ClusterAttention(nn.Module):
    """Attention among the tokens that are nearest to the same centroid: `choose_members`, then `attend_in_clusters`.

    Compatible with `KmeansAttention` of routing-transformer: `kmeans.means`, `kmeans.initted`, `mem_key`, `mem_value`.
    The centroids are those of the checkpoint; their moving average, the commitment loss and dropout are the training's.
    What the published class does where `kmeans.initted` is false, to replace them by a clustering of the first batch,
    is refused: results would depend on that batch.

    Args:
        heads, clusters, width: H, C and d.
        window: w, the tokens of a cluster; of the keys of a context, `context_window`.
        causal: a token sees no later one. Adds a memory slot where keys are not the queries, as published.
        shared_qk: queries are the keys: `k` is then what `q` is.
        memory: slots of keys and values of each cluster that every query of it sees.
        context: keys and values are another sequence.

    Shapes: q [B, H, N, d], k and v [B, H, Nk, d] -> [B, H, N, d], dtype of q. Masks [B, N] and [B, Nk] bool, False is
    padding; that of the keys is that of the queries unless given or `context`. A token that no cluster chose gives
    zeros. Samples of a batch do not depend on each other.

    Source: Roy et al., "Efficient content-based sparse attention with routing transformers" (TACL 2021); public
    package routing-transformer 1.6.1.
    """

    def __init__(
        self, heads: int, clusters: int, window: int, width: int, *, context_window: int | None = None,
        causal: bool = False, shared_qk: bool = False, memory: int = 0, context: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if context and (shared_qk or causal):
            raise ValueError("ClusterAttention: context must come without causal and shared_qk, got one of them")
        self.window, self.context_window = window, window if context_window is None else context_window
        self.causal, self.shared_qk, self.context = causal, shared_qk, context
        self.kmeans = Centroids(heads, clusters, width)
        memory = max(memory, 1 if causal and not shared_qk else 0)
        self.mem_key = nn.Parameter(torch.randn(heads, clusters, memory, width))
        self.mem_value = nn.Parameter(torch.randn(heads, clusters, memory, width))

    @classmethod
    def from_routing_transformer(cls, source: Any) -> "ClusterAttention":
        """The layer with the settings and weights of routing-transformer's `KmeansAttention`."""
        heads, clusters, memory, width = source.mem_key.shape
        layer = cls(
            heads, clusters, source.window_size, width, context_window=source.context_window_size,
            causal=source.causal, shared_qk=source.shared_qk, memory=memory, context=source.receives_context,
        )  # fmt: skip
        layer.load_state_dict(source.state_dict(), assign=True)
        return layer

    def set_centroids(self, means: torch.Tensor) -> None:
        """Use `means` [H, C, d] as centroids."""
        self.kmeans.set_centroids(means)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_mask: torch.Tensor | None = None,
        k_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend."""
        means = self.kmeans()
        q_members, k_members = choose_members(q, means, self.window), None
        if not self.shared_qk:
            k_members = choose_members(k, means, self.context_window if self.context else self.window)
        return attend_in_clusters(
            q, k, v, q_members, k_members, memory_k=self.mem_key, memory_v=self.mem_value, q_mask=q_mask,
            k_mask=q_mask if k_mask is None and not self.context else k_mask,
            causal=self.causal, shared_qk=self.shared_qk,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The settings."""
        return f"window={self.window}, causal={self.causal}, shared_qk={self.shared_qk}, context={self.context}"


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pairs of channels of x [B, H, N, d] turned by the angles whose sines and cosines [.., N, d] stand in halves."""
    sine, cosine = (half.repeat_interleave(2, -1) for half in table.to(x.dtype).chunk(2, -1))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cosine + turned * sine


class ClusterSelfAttention(nn.Module):
    """Projections around `ClusterAttention`, compatible with routing-transformer's `SelfAttention` without local heads.

    Its parameters are `to_q`, `to_k` (not with `shared_qk`), `to_v`, `to_out`, without biases, and those of
    `global_attn`. The published layer returns (y, loss); this one, which is not for its training, returns y.

    Args:
        dim: D of the tokens.
        heads: H, of `width` (default D / H) channels each.
        max_tokens: the longest sequence of the model, a multiple of `window`; max_tokens / window clusters.
        window, causal, shared_qk, memory, context: see `ClusterAttention`.

    Shapes: x [B, N, D], context [B, Nk, D] -> [B, N, D]. `positions` [.., N, width]: sines and cosines of a rotary
    embedding in halves, as `FixedPositionalEmbedding` gives them; queries, keys and, as published, values are turned.
    It is not used with a context.

    Source: as of `ClusterAttention`.
    """

    def __init__(
        self, dim: int, heads: int, window: int, max_tokens: int, *, width: int | None = None, causal: bool = False,
        shared_qk: bool = False, memory: int = 0, context: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or (width is None and dim % heads):
            raise ValueError(f"ClusterSelfAttention: heads must divide dim, {dim}, got {heads}")
        if window < 1 or max_tokens % window or max_tokens < window:
            raise ValueError(f"ClusterSelfAttention: max_tokens must be a multiple of {window}, got {max_tokens}")
        self.width = dim // heads if width is None else width
        inner = self.width * heads
        self.global_attn = ClusterAttention(
            heads, max_tokens // window, window, self.width, causal=causal, shared_qk=shared_qk, memory=memory,
            context=context,
        )  # fmt: skip
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        if not shared_qk:
            self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    @classmethod
    def from_routing_transformer(cls, source: Any) -> "ClusterSelfAttention":
        """The layer with the settings and weights of routing-transformer's `SelfAttention`.

        Raises:
            ValueError: it has local heads, which are another kind of attention.
        """
        if source.local_attn_heads:
            raise ValueError(f"ClusterSelfAttention: source must have no local heads, got {source.local_attn_heads}")
        attention = source.global_attn
        layer = cls(
            source.to_out.out_features, source.heads, source.window_size,
            source.window_size * attention.num_clusters, width=source.dim_head, causal=source.causal,
            shared_qk=source.shared_qk, memory=attention.num_mem_kv, context=source.receives_context,
        )  # fmt: skip
        layer.global_attn.context_window = attention.context_window_size
        layer.load_state_dict(source.state_dict(), assign=True)
        return layer

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, *, mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None, positions: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend."""
        attention = self.global_attn
        if (context is None) == attention.context:
            given = "none" if context is None else "one"
            raise ValueError(f"ClusterSelfAttention: context must be given where context=True only, got {given}")
        source = x if context is None else context
        for name, tokens in (("x", x), ("context", source)):
            if tokens.dim() != 3 or tokens.shape[2] != self.to_q.in_features:
                needed = f"[B, N, {self.to_q.in_features}]"
                raise ValueError(f"ClusterSelfAttention: {name} must be {needed}, got {list(tokens.shape)}")
        if positions is not None and context is None and list(positions.shape[-2:]) != [x.shape[1], self.width]:
            needed = f"[.., {x.shape[1]}, {self.width}]"
            raise ValueError(f"ClusterSelfAttention: positions must be {needed}, got {list(positions.shape)}")
        q, v = self._heads(self.to_q(x)), self._heads(self.to_v(source))
        k = None if attention.shared_qk else self._heads(self.to_k(source))
        if positions is not None and context is None:
            q, v = rotated(q, positions), rotated(v, positions)
            k = None if k is None else rotated(k, positions)
        y = attention(q, q if k is None else k, v, mask, context_mask)
        return self.to_out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)
