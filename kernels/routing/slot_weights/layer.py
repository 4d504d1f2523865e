"""SoftMoE: every slot mixes all tokens, every expert computes its slots, every token mixes all slots."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice
from planmill.kernels.routing.expert_mixture import mix_experts
from planmill.kernels.routing.slot_weights.loading import read_soft_moe_pytorch, read_vmoe
from planmill.kernels.routing.slot_weights.op import weigh_slots

FORMS = ("l2", "rms", "layer", "plain")


class SoftMoE(nn.Module):
    """A soft mixture of experts: `y = combine Experts(dispatch^T x)`, with the weights of `weigh_slots`.

    What is published differs in how tokens and slots are normalised before their product, and in what is dispatched:

        form     tokens and slots                          dispatched         as in
        "l2"     unit vectors, eps 1e-6 in the root;       the input          google-research/vmoe
                 one learned scale on the logits
        "rms"    unit vectors times sqrt(D) gamma          normalised input   soft-moe-pytorch
        "layer"  LayerNorm, eps 1e-5, gamma, fixed beta    normalised input   soft-moe-pytorch, use_layernorm
        "plain"  as they are                               the input          La-SoftMoE, our choice

    "rms" makes no normalised copy: norms go into the logits and into the dispatch weights. Logits, weights and both
    mixtures are float32 whatever the dtype of x; the experts run in the dtype of x, which is that of their weights.
    vmoe casts to bfloat16 before each mixture; this layer does not. Noise, a matter of training, is left to the caller.

    La-SoftMoE (`form="plain", weighting="linear"`) stands in parallel with the MLP inside the residual, which
    is the caller's wiring:

        x = x + attention(norm1(x));  h = norm2(x);  x = x + mlp(h) + soft(h)

    The row softmax is replaced by phi of standardised logits; phi, eps, the lack of an affine, the width of the
    experts and a scale on the output are not published: see `weigh_slots` for what we chose.

    Args:
        dim: D.
        experts, slots: E experts with `slots` slots each; S = experts * slots.
        hidden: F of an expert; 4 * dim if None.
        form: see above.
        weighting: "softmax" or "linear".
        activation: as in `mix_experts`.
        gated: experts are act(gate) * up, the gate first in `up`.

    Shapes: x [B, N, D], [B, D, H, W] (an image) or [B, D] (one token each) -> the same, dtype of x. `mask` [B, N] bool:
    False is padding: it is not dispatched, its result is 0, and what it holds does not matter. Images of a batch
    do not depend on each other. A NaN in a token that is not padding makes its own image NaN.

    Source: Puigcerver et al., "From sparse to soft mixtures of experts" (ICLR 2024), algorithm 1.
    """

    beta: torch.Tensor
    slot_beta: torch.Tensor

    def __init__(
        self, dim: int, experts: int, slots: int, hidden: int | None = None, *, form: str = "l2",
        weighting: str = "softmax", activation: str = "gelu", gated: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("SoftMoE", "form", form, FORMS)
        hidden = 4 * dim if hidden is None else hidden
        self.form, self.weighting, self.activation = form, weighting, activation
        self.slot_embeds = nn.Parameter(torch.randn(experts, slots, dim) * (1 if form == "rms" else dim**-0.5))
        if form == "l2":
            self.scale = nn.Parameter(torch.ones(()))
        if form in ("rms", "layer"):
            self.gamma, self.slot_gamma = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        if form == "layer":
            self.register_buffer("beta", torch.zeros(dim))
            self.register_buffer("slot_beta", torch.zeros(dim))
        bound_up, bound_down = 1 / math.sqrt(dim), 1 / math.sqrt(hidden)
        rows = 2 * hidden if gated else hidden
        self.up = nn.Parameter(torch.empty(experts, rows, dim).uniform_(-bound_up, bound_up))
        self.up_bias = nn.Parameter(torch.empty(experts, rows).uniform_(-bound_up, bound_up))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden).uniform_(-bound_down, bound_down))
        self.down_bias = nn.Parameter(torch.empty(experts, dim).uniform_(-bound_down, bound_down))

    @classmethod
    def from_soft_moe_pytorch(cls, source: nn.Module | Mapping[str, torch.Tensor]) -> "SoftMoE":
        """The layer with the weights of soft-moe-pytorch's `SoftMoE` (release 0.1.9), or of its state dict."""
        return cls._from(*read_soft_moe_pytorch(source))

    @classmethod
    def from_vmoe(cls, weights: Mapping[str, Any]) -> "SoftMoE":
        """The layer with the parameters of a vmoe soft MoE block: a nested or "/"-joined mapping of arrays.

        Read are `mu` [D, E, p] and `scale` of the router, and `Dense_0` and `Dense_1` of the MLP, kernels
        [E, in, out] and biases [E, out]. The activation is Flax's GELU, the tanh form.
        """
        return cls._from(*read_vmoe(weights))

    @classmethod
    def _from(cls, settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> "SoftMoE":
        with torch.device("meta"):
            layer = cls(**settings)
        layer.load_state_dict(weights, assign=True)
        return layer.requires_grad_()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mix `x`."""
        if x.dim() == 4:
            return self._mix(x.flatten(2).transpose(1, 2), mask).transpose(1, 2).reshape(x.shape)
        return self._mix(x[:, None], mask)[:, 0] if x.dim() == 2 else self._mix(x, mask)

    def _mix(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if x.dim() != 3 or x.shape[2] != self.slot_embeds.shape[2]:
            raise ValueError(f"SoftMoE: x must be [B, N, {self.slot_embeds.shape[2]}], got {list(x.shape)}")
        tokens = x.float()
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0.0)  # 0 times NaN is NaN
        if self.form == "layer":
            tokens = F.layer_norm(tokens, tokens.shape[2:], self.gamma.float(), self.beta.float())
        keys, scale = self._normalise(tokens)
        by_norm = self.form == "rms"
        dispatch, combine = weigh_slots(
            F.linear(tokens, keys), scale=scale, mask=mask, weighting=self.weighting, scale_dispatch=by_norm
        )
        slots = torch.bmm(dispatch.transpose(1, 2), tokens)
        if by_norm:
            slots = slots * self.gamma.float()
        return torch.bmm(combine, self._compute(slots.to(x.dtype)).float()).to(x.dtype)

    def _normalise(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys [S, D], whose product with the tokens is the logits but for a factor a token, and that factor [B, N]."""
        keys = self.slot_embeds.flatten(0, 1).float()
        if self.form == "l2":
            squares = torch.linalg.vector_norm(tokens, dim=2).square()
            unit = keys * (keys.square().sum(1, keepdim=True) + 1e-6).rsqrt()
            return unit * self.scale.float(), (squares + 1e-6).rsqrt()
        if self.form == "rms":
            width = math.sqrt(keys.shape[1])
            unit = F.normalize(keys, dim=1) * (width * self.slot_gamma.float() * self.gamma.float())
            return unit, width / torch.linalg.vector_norm(tokens, dim=2).clamp_min(1e-12)
        if self.form == "layer":
            keys = F.layer_norm(keys, keys.shape[1:], self.slot_gamma.float(), self.slot_beta.float())
        return keys, None

    def _compute(self, slots: torch.Tensor) -> torch.Tensor:
        """Each expert on its slots: [B, S, D] -> [B, S, D]."""
        batch, count, dim = slots.shape
        owner = torch.arange(self.up.shape[0], dtype=torch.int32, device=slots.device)
        owner = owner.repeat_interleave(self.slot_embeds.shape[1]).expand(batch, count).reshape(-1, 1)
        ones = torch.ones(owner.shape, dtype=torch.float32, device=slots.device)
        out = mix_experts(
            slots.reshape(-1, dim), owner, ones, self.up, self.down, up_bias=self.up_bias, down_bias=self.down_bias,
            activation=self.activation,
        )  # fmt: skip
        return out.view(batch, count, dim)

    def extra_repr(self) -> str:
        """The settings."""
        experts, slots, dim = self.slot_embeds.shape
        return f"{dim}, experts={experts}, slots={slots}, form={self.form!r}, weighting={self.weighting!r}"
