"""HiddenLinear and HiddenMixture: one linear layer, and a feed-forward block, over routed sub-dimensions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice
from planmill.kernels.routing.hidden_mixture.selection import select_hidden
from planmill.kernels.routing.token_routing.op import SCORES, route_tokens

SIDES = ("input", "output")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}

Routing = tuple[torch.Tensor, torch.Tensor]


def _fuse(y: torch.Tensor, fusion: torch.Tensor, shared: int) -> torch.Tensor:
    """Groups of `y` [..., D] mixed: group i becomes sum_j fusion[i, j] group j."""
    routed = y[..., shared:].unflatten(-1, (fusion.shape[0], -1))
    return torch.cat([y[..., :shared], (fusion @ routed).flatten(-2)], -1)


class HiddenLinear(nn.Module):
    """A linear layer, without bias, that reads (or writes) shared dimensions and the routed groups of each token alone.

    With `D = Ds + G g` dimensions on the sparse side, router logits `r = Wr x`, the K best groups `S_t` and their
    weights `a` (softmax or sigmoid of r), and `c = D / (Ds + K g)`:

        input:   y[t] = c (W[:, :Ds] x[t, :Ds] + sum over i in S_t of a[t, i] W[:, grp_i] x[t, grp_i])
        output:  y[t, :Ds] = c W[:Ds] x[t];  y[t, grp_i] = c a[t, i] W[grp_i] x[t] for i in S_t, otherwise 0

    and, with `fusion` (output only: in front of a product it would be part of W), the groups of y are mixed by a
    learned G x G matrix that starts as the identity, so that groups that were not chosen can be filled from the others.

    The computation is a dense product of the masked vector. We know the method from its abstract: the size of a group,
    the form of router, scale and fusion, and which sides are sparse are our choice.

    Args:
        in_features, out_features: as in nn.Linear.
        sparse: "input" or "output".
        shared: Ds, dimensions of the sparse side that every token uses.
        groups: G.
        active: K, groups of a token.
        score: "sigmoid" (default: weights do not shrink as groups are added) or "softmax".
        scaled: False: c = 1.
        fusion: as above.
        router: False: no router; every call brings the routing of another layer.

    Shapes: x [..., in_features] -> [..., out_features].

    Source: Mixture of Hidden-Dimensions (MoHD), from its abstract.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparse: str,
        shared: int,
        groups: int,
        active: int,
        score: str = "sigmoid",
        scaled: bool = True,
        fusion: bool = False,
        router: bool = True,
    ) -> None:
        super().__init__()
        check_choice("HiddenLinear", "sparse", sparse, SIDES)
        check_choice("HiddenLinear", "score", score, SCORES)
        if fusion and sparse == "input":
            raise ValueError(
                "HiddenLinear: fusion needs sparse='output'; in front of the product it is part of the weight"
            )
        width = in_features if sparse == "input" else out_features
        if groups < 1 or not 0 <= shared < width or (width - shared) % groups:
            raise ValueError(
                f"HiddenLinear: the {width} {sparse} dimensions must be shared + groups * g with g >= 1, "
                f"got shared={shared} and groups={groups}"
            )
        if not 1 <= active <= groups:
            raise ValueError(f"HiddenLinear: active must be 1 to {groups} groups, got {active}")
        self.sparse, self.shared, self.groups, self.active, self.score = sparse, shared, groups, active, score
        self.scale = width / (shared + active * (width - shared) // groups) if scaled else 1.0
        linear = nn.Linear(in_features, out_features, bias=False)
        self.weight = linear.weight
        self.router = nn.Linear(in_features, groups, bias=False) if router else None
        self.fusion = nn.Parameter(torch.eye(groups)) if fusion else None

    def route(self, x: torch.Tensor) -> Routing:
        """Groups [..., K] int32, ties to the lower, and weights [..., K] float32 of the tokens `x` [..., in_features].

        The routing is that of `route_tokens`.
        """
        if self.router is None:
            raise ValueError("HiddenLinear.route: the layer was made without a router; give it the routing of another")
        logits = self.router(x)
        indices, weights = route_tokens(logits.flatten(0, -2), self.active, score=self.score)
        return indices.view(*logits.shape[:-1], self.active), weights.view(*logits.shape[:-1], self.active)

    def forward(self, x: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """The layer; `routing` of another layer in place of its own, where several share one."""
        indices, weights = self.route(x) if routing is None else routing
        if self.sparse == "input":
            return F.linear(select_hidden(x, indices, weights, self.shared, self.groups, scale=self.scale), self.weight)
        y = F.linear(x, self.weight)
        y = select_hidden(y, indices, weights, self.shared, self.groups, scale=self.scale)
        return y if self.fusion is None else _fuse(y, self.fusion, self.shared)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("sparse", "shared", "groups", "active", "score", "scale")
        sizes = f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
        return ", ".join([sizes, *(f"{name}={getattr(self, name)}" for name in names)])


class HiddenMixture(nn.Module):
    """A feed-forward block over routed sub-dimensions of the model's width: one routing for its two products.

    `y = fuse(out(act(Wg z) * (Wu z)))`, with `z` the shared dimensions and the groups of the token: `gate_up` is an
    input-sparse HiddenLinear (the rows of the gate first), `down` an output-sparse one on the same groups.

    Args:
        width: D = shared + groups * g, the model's width.
        hidden: F, width between the products.
        shared, groups, active, score, scaled, fusion: as in `HiddenLinear`.
        activation: "silu", "gelu" or "relu".

    Shapes: x [..., D] -> [..., D].

    Source: Mixture of Hidden-Dimensions (MoHD), from its abstract; see `HiddenLinear` for what is ours.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        shared: int,
        groups: int,
        active: int,
        score: str = "sigmoid",
        scaled: bool = True,
        fusion: bool = True,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        check_choice("HiddenMixture", "activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        sizes: dict[str, Any] = {"shared": shared, "groups": groups, "active": active, "scaled": scaled}
        self.gate_up = HiddenLinear(width, 2 * hidden, sparse="input", score=score, **sizes)
        self.down = HiddenLinear(hidden, width, sparse="output", router=False, fusion=fusion, **sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block, without residual."""
        routing = self.gate_up.route(x)
        gate, up = self.gate_up(x, routing).chunk(2, -1)
        return self.down(ACTIVATIONS[self.activation](gate) * up, routing)

    def extra_repr(self) -> str:
        """The settings."""
        return f"activation={self.activation!r}"
