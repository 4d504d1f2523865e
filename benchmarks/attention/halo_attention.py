"""HaloAttention, the whole layer, against timm's HaloAttn, at the sizes of timm's models for 256 x 256 images.

The two 1 x 1 convolutions are the same calls in both. Error: largest difference of one random image from float64, as a
share of its largest result.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.attention import HaloAttention
from planmill.kernels.attention.halo_attention.reference import halo_attention_reference

from ..cases import Case, Draw, Goal, Peer
from ..published import load

EAGER, COMPILED = "timm HaloAttn", "timm HaloAttn, torch.compile"


def make(batch: int, dim: int, size: int, **options: Any) -> Callable[[Draw], tuple]:
    """A picture of features and a layer with random weights."""

    def draw_all(draw: Draw) -> tuple:
        layer = HaloAttention(dim, **options)
        for parameter in layer.parameters():
            parameter.data = draw.normal(*parameter.shape) * (parameter.shape[1] ** -0.5)
        return draw.normal(batch, dim, size, size), layer.to(draw.device, draw.dtype).requires_grad_(False)

    return draw_all


def ours(x: torch.Tensor, layer: HaloAttention) -> torch.Tensor:
    """The layer."""
    return layer(x)


def theirs(x: torch.Tensor, layer: HaloAttention) -> Any:
    """timm's module with the same weights."""
    module = load("timm.layers.halo_attn").HaloAttn(
        layer.q.in_channels, layer.num_heads * layer.dim_head_v, stride=layer.query_stride, num_heads=layer.num_heads,
        dim_head=layer.dim_head_qk, block_size=layer.block_size, halo_size=layer.halo_size,
    )  # fmt: skip
    module.load_state_dict(layer.state_dict())
    return module.to(x.device, x.dtype).eval().requires_grad_(False)


def eager(x: torch.Tensor, layer: HaloAttention) -> Callable[[], torch.Tensor]:
    """As timm runs it."""
    module = theirs(x, layer)
    return lambda: module(x)


def compiled(x: torch.Tensor, layer: HaloAttention) -> Callable[[], torch.Tensor]:
    """Under torch.compile; compiling is not timed."""
    module = torch.compile(theirs(x, layer))
    module(x)
    return lambda: module(x)


def check(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    x, layer = args
    i = int(torch.randint(len(x), ()))
    maps = []
    for conv in (layer.q, layer.kv):
        weight = conv.weight.double()
        maps.append(torch.nn.functional.conv2d(x[i : i + 1].double(), weight, stride=conv.stride))
    q, kv = (m.unflatten(1, (layer.num_heads, -1)) for m in maps)
    k, v = kv.split([layer.dim_head_qk, layer.dim_head_v], 2)
    want = halo_attention_reference(
        q, k, v, layer.pos_embed.height_rel, layer.pos_embed.width_rel, layer.block_size, layer.halo_size,
        layer.query_stride, layer.dim_head_qk**-0.5, False, False,
    ).flatten(1, 2)[0]  # fmt: skip
    return float((found[i].double() - want).abs().max() / want.abs().max())


def flops(x: torch.Tensor, layer: HaloAttention) -> float:
    """Convolutions; of each query its logits, values and positional products, with the keys outside the image."""
    pixels, win = x.shape[0] * x.shape[2] * x.shape[3], layer.block_size + 2 * layer.halo_size
    queries = pixels / layer.query_stride**2
    d, dv = layer.dim_head_qk, layer.dim_head_v
    side = layer.block_size // layer.query_stride
    attention = layer.num_heads * (win * win * (d + dv) + 2 * (win + side - 1) * d)
    return 2.0 * (queries * (layer.q.weight.numel() + attention) + pixels * layer.kv.weight.numel())


CASES = [
    Case(
        op="halo_attention",
        id=f"layer-{model}-C{dim}-{size}x{size}-stride{stride}-halo{halo}",
        make=make(1, dim, size, stride=stride, halo_size=halo),
        small=make(1, 16, 8, stride=stride, halo_size=halo),
        ours=ours,
        peers={EAGER: Peer(eager, package="timm", tolerance=1e-4),
               COMPILED: Peer(compiled, package="timm", tolerance=1e-4)},
        check=check,
        tolerance={torch.float32: 2e-5},
        flops=flops,
        goals=(Goal("ratio", 2.0, EAGER, torch.float32),) if model == "halonet26t" else (),
        memory=True,
    )
    for model, dim, size, stride, halo in (
        ("halonet26t", 256, 16, 1, 2),
        ("halonet26t", 512, 16, 2, 2),
        ("halonet26t", 512, 8, 1, 2),
        ("halonet50ts", 256, 16, 1, 3),
        ("halonet_h1", 64, 64, 1, 3),
    )
]  # fmt: skip
