"""LinearAttention: projections around `attend_linearly`, with the weights of two public libraries."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from planmill.kernels.attention.linear_attention.op import attend_linearly
from planmill.kernels.attention.linear_attention.reference import FEATURE_MAPS
from planmill.kernels.common.checks import check_choice

FAST_TRANSFORMERS = {"q": "query_projection", "k": "key_projection", "v": "value_projection", "o": "out_projection"}


class LinearAttention(nn.Module):
    """Multi-head attention without the softmax: `o_proj(norm(attend_linearly(q_proj(x), k_proj(x), v_proj(x))))`.

    Parameters are named as in flash-linear-attention: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `norm.weight` where
    there is a norm. State dicts of fast-transformers' `AttentionLayer` (`query_projection`, ...) load too.

    Args:
        dim: C.
        heads: H.
        key_dim, value_dim: width of all heads together; dim if None.
        feature_map, normalize, causal, scale, eps: as in `attend_linearly`.
        output_norm: an RMSNorm of every head's result, eps 1e-5, before `o_proj`; what follows where not normalized.
        bias: biases of the projections; fast-transformers has them, flash-linear-attention has none.

    Shapes: x [B, N, C] -> the same. `mask` [B, N] bool: False is padding that no token sees; its own rows are
    computed like others and are for the caller to drop. Samples of a batch do not depend on each other.

    Source: Katharopoulos et al., "Transformers are RNNs" (ICML 2020); the norm in place of the normaliser: Qin et al.,
    "The devil in linear transformer" (EMNLP 2022).
    """

    def __init__(
        self, dim: int, heads: int, *, key_dim: int | None = None, value_dim: int | None = None,
        feature_map: str = "elu", normalize: bool = True, causal: bool = False, scale: float | None = None,
        eps: float = 1e-6, output_norm: bool = False, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("LinearAttention", "feature_map", feature_map, FEATURE_MAPS)
        key_dim, value_dim = key_dim or dim, value_dim or dim
        if heads < 1 or key_dim % heads or value_dim % heads:
            raise ValueError(
                f"LinearAttention: heads must divide key_dim and value_dim, got {heads}, {key_dim}, {value_dim}"
            )
        self.heads, self.feature_map, self.normalize, self.causal = heads, feature_map, normalize, causal
        self.scale, self.eps = scale, eps
        self.q_proj, self.k_proj = nn.Linear(dim, key_dim, bias=bias), nn.Linear(dim, key_dim, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(dim, value_dim, bias=bias), nn.Linear(value_dim, dim, bias=bias)
        self.norm = nn.RMSNorm(value_dim // heads, eps=1e-5) if output_norm else nn.Identity()

    @classmethod
    def from_fast_transformers(
        cls, source: nn.Module | Mapping[str, torch.Tensor], heads: int | None = None, *, causal: bool | None = None,
        feature_map: str = "elu", eps: float | None = None,
    ) -> "LinearAttention":  # fmt: skip
        """The layer with the weights of fast-transformers' `AttentionLayer` (release 0.4), or of its state dict.

        A module tells `heads`, `causal` and `eps`; a state dict needs `heads`. The feature map of the module is a
        closure that cannot be read: say it where it is not elu(x) + 1.
        """
        if isinstance(source, nn.Module):
            inner: Any = source.inner_attention
            heads = source.n_heads if heads is None else heads  # type: ignore[assignment]
            causal = type(inner).__name__.startswith("Causal") if causal is None else causal
            eps = inner.eps if eps is None else eps
        state = _read(source, "from_fast_transformers", FAST_TRANSFORMERS, heads)
        settings = {"causal": bool(causal), "feature_map": feature_map, "eps": 1e-6 if eps is None else eps}
        return cls._from(state, heads, **settings)

    @classmethod
    def from_fla(
        cls, source: nn.Module | Mapping[str, torch.Tensor], heads: int | None = None, *, feature_map: str,
        normalize: bool | None = None,
    ) -> "LinearAttention":  # fmt: skip
        """The layer with the weights of flash-linear-attention's `LinearAttention`, or of its state dict; causal.

        Feature maps without parameters ("elu", "relu", "identity"), as many key heads as heads, no norm of q or k.
        """
        if isinstance(source, nn.Module):
            heads = source.num_heads if heads is None else heads  # type: ignore[assignment]
            normalize = source.do_feature_map_norm if normalize is None else normalize  # type: ignore[assignment]
            if source.norm_q or source.norm_k or source.num_kv_heads != heads:
                raise ValueError("LinearAttention.from_fla: norm_q, norm_k and fewer key heads have no conversion")
        state = _read(source, "from_fla", {p: f"{p}_proj" for p in "qkvo"}, heads)
        width = state["q_proj.weight"].shape[0] // (heads or 1)
        settings = {"normalize": bool(normalize), "feature_map": feature_map, "eps": 1e-10, "scale": width**-0.5}
        return cls._from(state, heads, causal=True, output_norm="norm.weight" in state, **settings)

    @classmethod
    def _from(cls, state: dict[str, torch.Tensor], heads: int | None, **settings: Any) -> "LinearAttention":
        (key_dim, dim), value_dim = state["q_proj.weight"].shape, state["v_proj.weight"].shape[0]
        bias = "q_proj.bias" in state
        with torch.device("meta"):
            layer = cls(dim, heads or 1, key_dim=key_dim, value_dim=value_dim, bias=bias, **settings)
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for short, long in FAST_TRANSFORMERS.items():
            for kind in ("weight", "bias"):
                if f"{prefix}{long}.{kind}" in state_dict:
                    state_dict[f"{prefix}{short}_proj.{kind}"] = state_dict.pop(f"{prefix}{long}.{kind}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within `x`."""
        if x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            raise ValueError(f"LinearAttention: x must be [B, N, {self.q_proj.in_features}], got {list(x.shape)}")
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = attend_linearly(
            q, k, v, feature_map=self.feature_map, normalize=self.normalize, causal=self.causal, mask=mask,
            scale=self.scale, eps=self.eps,
        )  # fmt: skip
        return self.o_proj(self.norm(o).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The settings."""
        return f"heads={self.heads}, feature_map={self.feature_map!r}, normalize={self.normalize}, causal={self.causal}"


def _read(
    source: nn.Module | Mapping[str, torch.Tensor], op: str, names: dict[str, str], heads: int | None
) -> dict[str, torch.Tensor]:
    """The weights under our names; `names`: theirs for q, k, v and o."""
    if not heads:
        raise ValueError(f"LinearAttention.{op}: heads must be given with a state dict, got {heads}")
    state = {k: v.detach() for k, v in (source.state_dict() if isinstance(source, nn.Module) else source).items()}
    found = {
        f"{short}_proj.{kind}": state.pop(f"{long}.{kind}")
        for short, long in names.items()
        for kind in ("weight", "bias")
        if f"{long}.{kind}" in state
    }
    if "norm.weight" in state:
        found["norm.weight"] = state.pop("norm.weight")
    missing = [names[p] for p in names if f"{p}_proj.weight" not in found]
    if missing or state:
        raise ValueError(
            f"LinearAttention.{op}: the weights must be those of {', '.join(names.values())}; "
            f"missing: {', '.join(missing) or 'none'}, left over: {', '.join(state) or 'none'}"
        )
    return found
