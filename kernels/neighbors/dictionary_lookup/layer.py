"""DictionaryLookup: few-shot normal features as a dictionary, and how far a token is from what it finds there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice
from planmill.kernels.neighbors.dictionary_lookup.op import lookup_dictionary
from planmill.kernels.neighbors.dictionary_lookup.reference import POWERS

DICTAS = {"query.": "Query_Generator.", "key.": "Key_Generator.", "value.": "Value_Generator.AttnBlock."}
NAMES = {"inner_norm": "TwoLayerMLP.norm", "first": "TwoLayerMLP.linear1", "second": "TwoLayerMLP.linear2",
         "last": "TwoLayerMLP.linear3", "norm": "norm1"}  # fmt: skip


class TokenGenerator(nn.Module):
    """What DictAS makes queries, keys and values with: attention of the tokens of a set, then a small MLP.

        h = LN(x);   y = W3 LN(W2 (W1 attention(h) + b1 + h) + b2);   y + x if `residual`

    Args:
        dim: D.
        heads: of the attention, whose projections have no bias.
        residual: x is added: the generator of values.

    Shapes: x [B, N, D] -> the same.
    """

    def __init__(self, dim: int, heads: int = 4, *, residual: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"TokenGenerator: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads, self.residual = heads, residual
        self.norm, self.inner_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.first, self.second, self.last = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Generate from `x`."""
        h = self.norm(x)
        q, k, v = (p(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.last(self.inner_norm(self.second(self.first(mixed) + h)))
        return x + y if self.residual else y


class DictionaryLookup(nn.Module):
    """DictAS: tokens looked up in a dictionary of normal tokens; those that it cannot express are anomalous.

        keys = K(support), values = V(support), once;   found = lookup_dictionary(Q(x), keys, values)
        distance = (1 - cos(x, found)) / 2

    Q, K and V are `TokenGenerator`s, or the identity (`generated=False`: no training, tokens are compared as they are).
    The published code generates keys and values anew for every image; here `fit` does it once, without a gradient. Its
    dropout, of training only, is left out; scales (average-pooled copies of the map), layers and the text branch are
    the caller's.

    Args:
        dim: D.
        heads: of the generators.
        weighting: "sparsemax" or "entmax15".
        scale: of the inner products; 1 / sqrt(D) if None.
        generated: see above.

    Shapes: x [B, N, D] -> found [B, N, D], dtype of x, and distance [B, N] float32, from 0 (the same direction) to 1.
    An image's result does not depend on its batch beyond what torch's matrix products do.

    Source: DictAS (Qu et al., 2025), dictionary construction and lookup.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(
        self, dim: int, heads: int = 4, *, weighting: str = "sparsemax", scale: float | None = None,
        generated: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("DictionaryLookup", "weighting", weighting, tuple(POWERS))
        self.dim, self.weighting, self.scale = dim, weighting, scale
        made = [
            TokenGenerator(dim, heads, residual=residual) if generated else nn.Identity()
            for residual in (False, False, True)
        ]
        self.query, self.key, self.value = made
        self.register_buffer("keys", torch.empty(0, dim))
        self.register_buffer("values", torch.empty(0, dim))

    @classmethod
    def from_dictas(cls, state: Mapping[str, torch.Tensor], heads: int = 4) -> "DictionaryLookup":
        """The layer with the generators of a DictAS state dict; its text branch is not read.

        Raises:
            ValueError: a tensor of a generator is missing.
        """
        name = "Query_Generator.q_proj.weight"
        if name not in state:
            raise ValueError(f"DictionaryLookup: the state dict lacks {name}")
        layer = cls(len(state[name]), heads)
        weights = {}
        for own in layer.state_dict():
            prefix, _, rest = own.partition(".")
            if rest:
                part, _, kind = rest.rpartition(".")
                name = f"{DICTAS[prefix + '.']}{NAMES.get(part, part)}.{kind}"
                if name not in state:
                    raise ValueError(f"DictionaryLookup: the state dict lacks {name}")
                weights[own] = state[name]
        layer.load_state_dict(weights, strict=False)
        return layer

    @torch.no_grad()
    def fit(self, support: torch.Tensor) -> "DictionaryLookup":
        """Make the dictionary from normal tokens; returns self.

        Args:
            support: [m, D] or [images, P, D] with at least one token, dtype and device of the layer. The tokens of all
                images attend to each other, as in the published code.

        Raises:
            ValueError: another shape, or no token.
        """
        if support.dim() not in (2, 3) or support.shape[-1] != self.dim or support.numel() == 0:
            raise ValueError(
                f"DictionaryLookup: support must be [m, {self.dim}] or [images, P, {self.dim}] with at least one "
                f"token, got {list(support.shape)}"
            )
        tokens = support.reshape(1, -1, self.dim)
        self.keys, self.values = self.key(tokens)[0].contiguous(), self.value(tokens)[0].contiguous()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up `x`: what was found, and how far it is."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"DictionaryLookup: x must be [B, N, {self.dim}], got {list(x.shape)}")
        if self.keys.shape[0] == 0:
            raise ValueError("DictionaryLookup: there is no dictionary: call fit first")
        found = lookup_dictionary(self.query(x), self.keys, self.values, scale=self.scale, weighting=self.weighting)
        return found, (1 - F.cosine_similarity(x.float(), found.float(), dim=2)) / 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a dictionary of any size from a state dict."""
        for name in ("keys", "values"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.empty_like(stored, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The settings and the size of the dictionary."""
        return f"{self.dim}, weighting={self.weighting!r}, scale={self.scale}, atoms={self.keys.shape[0]}"
