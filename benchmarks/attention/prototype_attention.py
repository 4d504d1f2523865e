"""INP-Former's attentions at ViT-B/14, 392 x 392: 784 tokens, C = 768, 12 heads, 6 prototypes; a layer each, no MLP.

The extractor runs on PyTorch's products and attention, whatever the row says of the op's kernel.

Error: largest difference of one random sample from float64, as a share of its largest result.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention import PrototypeAttention, PrototypeExtractor

from ..cases import Case, Draw, Peer, plain

HEADS, PROTOTYPES, DIM = 12, 6, 768


def make(kind: str, batch: int, tokens: int = 784, dim: int = DIM) -> Callable[[Draw], tuple]:
    """Tokens, prototypes and an attention with random weights."""

    def draw_all(draw: Draw) -> tuple:
        layer: nn.Module = PrototypeAttention(dim, HEADS) if kind == "decoder" else PrototypeExtractor(dim, HEADS).attn
        for parameter in layer.parameters():
            parameter.data = draw.normal(*parameter.shape) * parameter.shape[-1] ** -0.5
        layer = layer.to(draw.device, draw.dtype).requires_grad_(False)
        return draw.normal(batch, tokens, dim), draw.normal(batch, PROTOTYPES, dim), layer

    return draw_all


def ours(tokens: torch.Tensor, prototypes: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The layer; the extractor's queries are the prototypes."""
    return layer(tokens, prototypes) if hasattr(layer, "learn_scale") else layer(prototypes, tokens)


def published(tokens: torch.Tensor, prototypes: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """q, k, v of everything, a product a head, the output projection."""
    decoder = hasattr(layer, "learn_scale")
    x, y = (tokens, prototypes) if decoder else (prototypes, tokens)
    w = {name: p.to(x.dtype) for name, p in layer.state_dict().items()}
    q = F.linear(x, w["q.weight"], w["q.bias"]).unflatten(2, (HEADS, -1)).transpose(1, 2)
    k, v = F.linear(y, w["kv.weight"], w["kv.bias"]).unflatten(2, (2, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
    if decoder:
        a = F.relu(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * w["learn_scale"])
    else:
        a = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)
    return F.linear((a @ v).transpose(1, 2).flatten(2), w["proj.weight"], w["proj.bias"])


def check(args: tuple, found: torch.Tensor) -> float:
    """One random sample in float64."""
    tokens, prototypes, layer = args
    i = int(torch.randint(len(tokens), ()))
    want = published(tokens[i : i + 1].double(), prototypes[i : i + 1].double(), layer)
    return float((found[i].double() - want[0]).abs().max() / want.abs().max())


def flops(tokens: torch.Tensor, prototypes: torch.Tensor, layer: nn.Module) -> float:
    """The folded forms: a projection of the tokens (decoder), and a product with 72 rows (extractor: two)."""
    rows = tokens.shape[0] * tokens.shape[1]
    shared = 2 * rows * HEADS * PROTOTYPES * tokens.shape[2]
    return 2.0 * shared if not hasattr(layer, "learn_scale") else float(shared + 2 * rows * tokens.shape[2] ** 2)


CASES = [
    Case(
        op="prototype_attention",
        id=f"{kind}-B{batch}-N784-C768-M6",
        make=make(kind, batch),
        small=make(kind, 1, 20, 48),
        ours=ours,
        peers={"torch, as published": Peer(plain(published), tolerance=5e-2)},
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=flops,
        memory=batch == 1,
    )
    for kind in ("decoder", "extractor")
    for batch in (1, 8)
]
