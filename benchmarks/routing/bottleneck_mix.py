"""BottleneckMix, the whole layer: 8 filters, 2 of them used. It is made of other ops; `op` names the one that routes.

Error: largest difference of one random sample from float64, as a share of its largest result.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing import BottleneckMix

from ..cases import Case, Draw, Peer, plain


def make(gate_by: str, batch: int, positions: int, channels: int) -> Callable[[Draw], tuple]:
    """Features and a layer with random weights."""

    def draw_all(draw: Draw) -> tuple:
        layer = BottleneckMix(channels, 8, 2, gate_by=gate_by)
        for parameter in layer.parameters():
            parameter.data = parameter.shape[-1] ** -0.5 * draw.normal(*parameter.shape)
        return draw.normal(batch, positions, channels), layer.to(draw.device, draw.dtype).requires_grad_(False)

    return draw_all


def ours(x: torch.Tensor, layer: BottleneckMix) -> torch.Tensor:
    """The layer."""
    return layer(x)


def loop(x: torch.Tensor, layer: BottleneckMix) -> torch.Tensor:
    """Filter by filter over the samples (positions) that chose it."""
    p = {name: value.to(x.dtype) for name, value in layer.named_parameters()}
    by_sample = layer.gate_by == "sample"
    rows = x if by_sample else x.flatten(0, 1)[:, None]
    found = F.linear(rows.mean(1), p["gate.weight"], p["gate.bias"]).topk(layer.k, 1)
    g, y = found.values.softmax(1), torch.zeros_like(rows)
    for e in range(len(layer.down)):
        which, slot = (found.indices == e).nonzero(as_tuple=True)
        if len(which):
            h = F.relu(F.linear(rows[which], p["down"][e], p["down_bias"][e]))
            y.index_add_(0, which, F.linear(h, p["up"][e], p["up_bias"][e]) * g[which, slot, None, None])
    return y.view(x.shape)


def dense(x: torch.Tensor, layer: BottleneckMix) -> torch.Tensor:
    """Every filter on every position, weighted by a gate that is mostly zero: no selection, no synchronisation."""
    seen = x.mean(1, keepdim=True) if layer.gate_by == "sample" else x
    found = F.linear(seen, layer.gate.weight, layer.gate.bias).topk(layer.k, 2)
    g = x.new_zeros(*seen.shape[:2], len(layer.down)).scatter(2, found.indices, found.values.softmax(2))
    h = F.relu(torch.einsum("bnc,ehc->bneh", x, layer.down) + layer.down_bias) * g[..., None]
    return torch.einsum("bneh,ech->bnc", h, layer.up) + g @ layer.up_bias


def check(args: tuple, found: torch.Tensor) -> float:
    """One random sample in float64."""
    x, layer = args
    i = int(torch.randint(len(x), ()))
    want = loop(x[i : i + 1].double(), layer)
    return float((found[i].double() - want[0]).abs().max() / want.abs().max())


def flops(x: torch.Tensor, layer: BottleneckMix) -> float:
    """Two matrices for each of k filters at each position."""
    return 2.0 * x[..., 0].numel() * layer.k * (layer.down[0].numel() + layer.up[0].numel())


CASES = [
    Case(
        op="token_routing" if gate_by == "sample" else "expert_mixture",
        id=f"layer-by-{gate_by}-B{batch}-N{positions}-C{channels}-E8-k2",
        make=make(gate_by, batch, positions, channels),
        small=make(gate_by, 2, 5, 16),
        ours=ours,
        peers={"torch loop over filters": Peer(plain(loop)), "torch einsum, all filters": Peer(plain(dense))},
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=flops,
    )
    for gate_by in ("sample", "position")
    for batch, positions, channels in ((1, 1024, 256), (8, 1024, 256))
]
