"""SoftMoE, the whole layer, at the size of a ViT-B/16 block: 196 tokens, D = 768, F = 3072.

Error: largest difference of one random image from float64, as a share of its largest result.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing import SoftMoE

from ..cases import Case, Draw, Peer, plain

PACKAGE = "soft_moe_pytorch.SoftMoE"


def make(
    batch: int,
    experts: int,
    slots: int,
    tokens: int = 196,
    dim: int = 768,
    form: str = "rms",
    weighting: str = "softmax",
) -> Callable[[Draw], tuple]:
    """Random weights, gammas near one, and tokens."""

    def draw_all(draw: Draw) -> tuple:
        layer = SoftMoE(dim, experts, slots, form=form, weighting=weighting)
        for parameter in layer.parameters():
            near = 1.0 if parameter.dim() == 1 and parameter is not None and len(parameter) == dim else 0.0
            width = 1.0 if parameter is layer.slot_embeds and form == "rms" else parameter.shape[-1] ** -0.5
            parameter.data = near + width * draw.normal(*parameter.shape)
        return draw.normal(batch, tokens, dim), layer.to(draw.device, draw.dtype).requires_grad_(False)

    return draw_all


def ours(x: torch.Tensor, layer: SoftMoE) -> torch.Tensor:
    """The layer."""
    return layer(x)


def package(x: torch.Tensor, layer: SoftMoE) -> Callable[[], torch.Tensor]:
    """soft-moe-pytorch's module with the same weights."""
    from soft_moe_pytorch import SoftMoE as Theirs

    experts, slots, dim = layer.slot_embeds.shape
    theirs = Theirs(dim=dim, num_experts=experts, num_slots=slots).to(x.device, x.dtype).requires_grad_(False)
    theirs.slot_embeds.data, theirs.norm.gamma.data = layer.slot_embeds.data, layer.gamma.data
    theirs.slot_norm.gamma.data = layer.slot_gamma.data
    for e, (up, _, _, down) in enumerate(theirs.experts.experts):
        up.weight.data, up.bias.data = layer.up.data[e], layer.up_bias.data[e]
        down.weight.data, down.bias.data = layer.down.data[e], layer.down_bias.data[e]
    return lambda: theirs(x)


def logits_of(x: torch.Tensor, layer: SoftMoE) -> tuple[torch.Tensor, torch.Tensor]:
    """What is dispatched and the logits, in the dtype of x."""
    keys, width = layer.slot_embeds.to(x.dtype).flatten(0, 1), x.shape[2] ** 0.5
    if layer.form == "rms":
        x = F.normalize(x, dim=2) * width * layer.gamma.to(x.dtype)
        keys = F.normalize(keys, dim=1) * width * layer.slot_gamma.to(x.dtype)
    return x, x @ keys.T


def formula(x: torch.Tensor, layer: SoftMoE) -> torch.Tensor:
    """Two softmaxes (or the linear weighting), batched products, a loop over the experts."""
    values, logits = logits_of(x, layer)
    if layer.weighting == "softmax":
        combine = logits.softmax(2)
    else:
        centred = logits - logits.mean(1, keepdim=True)
        phi = F.elu(centred * (logits.var(1, keepdim=True, unbiased=False) + 1e-5).rsqrt()) + 1
        combine = phi / (phi.sum(2, keepdim=True) + 1e-6)
    slots = logits.softmax(1).mT @ values
    per, outs = layer.slot_embeds.shape[1], []
    for e, (up, b, down, c) in enumerate(zip(layer.up, layer.up_bias, layer.down, layer.down_bias, strict=True)):
        z = slots[:, e * per : (e + 1) * per]
        h = F.gelu(F.linear(z, up.to(x.dtype), b.to(x.dtype)))
        outs.append(F.linear(h, down.to(x.dtype), c.to(x.dtype)))
    return combine @ torch.cat(outs, 1)


def compiled(x: torch.Tensor, layer: SoftMoE) -> Callable[[], torch.Tensor]:
    """The formula under torch.compile; compiling is not timed."""
    call = torch.compile(formula)
    call(x, layer)
    return lambda: call(x, layer)


def check(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    x, layer = args
    i = int(torch.randint(len(x), ()))
    want = formula(x[i : i + 1].double(), layer)
    return float((found[i].double() - want[0]).abs().max() / want.abs().max())


def flops(x: torch.Tensor, layer: SoftMoE) -> float:
    """Logits, dispatch, combine, and two matrices for each slot."""
    slots = layer.slot_embeds.shape[0] * layer.slot_embeds.shape[1]
    return 2.0 * len(x) * slots * (3 * x.shape[1] * x.shape[2] + layer.up[0].numel() + layer.down[0].numel())


FORMULA = {"torch einsum + loop over experts": Peer(plain(formula), tolerance=5e-2)}
COMPILED = {"the same, torch.compile": Peer(compiled, tolerance=5e-2)}
THEIRS = {PACKAGE: Peer(package, package="soft_moe_pytorch", tolerance=5e-2)}

CASES = [
    Case(
        op="slot_weights",
        id=f"layer-B{batch}-N196-E{experts}-p{slots}-D768-{name}",
        make=make(batch, experts, slots, form=form, weighting=weighting),
        small=make(1, 2, 3, 10, 32, form=form, weighting=weighting),
        ours=ours,
        peers={**(THEIRS if form == "rms" else {}), **FORMULA, **(COMPILED if experts < 100 else {})},
        check=check,
        tolerance={torch.float32: 2e-5},
        flops=flops,
    )
    for batch, experts, slots, name, form, weighting in (
        (1, 4, 49, "rms", "rms", "softmax"),
        (8, 4, 49, "rms", "rms", "softmax"),
        (1, 128, 1, "rms", "rms", "softmax"),
        (1, 4, 49, "linear", "plain", "linear"),
        (8, 4, 49, "linear", "plain", "linear"),
    )
]
