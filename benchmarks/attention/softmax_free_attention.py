"""SOFT's attention: the function at the sizes of SOFT-Tiny, long sequences, and the layer.

Error: largest difference of one random head (of the layer: one random image) from float64, as a share of its root mean
square. Landmarks are spread so that Newton converges in about ten of its twenty steps ("near": not at all).
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.attention import SoftmaxFreeAttention, attend_softmax_free
from planmill.kernels.attention.softmax_free_attention.reference import softmax_free_attention_reference

from ..cases import Case, Draw, Goal, Peer, plain

FORMULA, SDPA, PUBLISHED = "PyTorch formula", "scaled_dot_product_attention", "the published layer in PyTorch"


def make(batch: int, heads: int, tokens: int, m: int, d: int = 32, spread: float = 0.5) -> Callable[[Draw], tuple]:
    """Queries and landmarks around one mean."""

    def draw_all(draw: Draw) -> tuple:
        q, v = draw.normal(batch, heads, tokens, d), draw.normal(batch, heads, tokens, d)
        return q, v, draw.normal(batch, heads, m, d) * spread

    return draw_all


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x - y|^2 / 2), as one writes it: squares and a product."""
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)
    return torch.exp(-squares.clamp_min(0) / 2)


def newton(a: torch.Tensor) -> torch.Tensor:
    """Twenty steps, batched."""
    alpha = 1.8 / a.sum(-1).amax(-1).square()
    p = a + 0.01 * torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
    v = alpha[..., None, None] * p
    for _ in range(20):
        v = 2 * v - v @ p @ v
    return v


def formula(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """Cm pinv(A) (Cm^T V) with careful order of products."""
    c = kernel(q * q.shape[3] ** -0.25, landmarks)
    return c @ (newton(kernel(landmarks, landmarks)) @ (c.mT @ v))


def solved(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """The same with Cholesky."""
    c, a = kernel(q * q.shape[3] ** -0.25, landmarks), kernel(landmarks, landmarks)
    p = a + 0.01 * torch.eye(a.shape[-1], device=a.device)
    return c @ torch.cholesky_solve(c.mT @ v, torch.linalg.cholesky(p))


def softmax(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """What SOFT replaces, on the same heads: something else, for scale."""
    return F.scaled_dot_product_attention(q, q, v)


def check(mode: str) -> Callable[[tuple, torch.Tensor], float]:
    """One random head in float64."""

    def error(args: tuple, found: torch.Tensor) -> float:
        b, h = (int(torch.randint(n, ())) for n in args[0].shape[:2])
        q, v, landmarks = (t[b : b + 1, h : h + 1].cpu().double() for t in args)
        want = softmax_free_attention_reference(q, v, landmarks, q.shape[3] ** -0.25, mode, 20, 0.01, False, False)
        return float((found[b, h].cpu().double() - want[0, 0]).abs().max() / want.square().mean().sqrt())

    return error


def flops(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> float:
    """Cm, W and Y, and Newton's forty products."""
    (b, h, n, d), m = q.shape, landmarks.shape[2]
    return b * h * (2.0 * n * m * (d + 2 * v.shape[3]) + 80.0 * m**3)


def function_case(id: str, *sizes: int, mode: str = "newton", goals: tuple[Goal, ...] = (), **options: float) -> Case:
    """A case of the function; 32 channels a head."""
    long = sizes[2] >= 4096
    yardstick = {SDPA: Peer(plain(softmax), yardstick=True)} if long and sizes[2] < 20000 else {}
    return Case(
        op="softmax_free_attention",
        id=id,
        make=make(*sizes, **options),
        small=make(1, 2, 50, 9),
        ours=lambda q, v, landmarks: attend_softmax_free(q, v, landmarks, mode=mode),
        peers={FORMULA: Peer(plain(formula if mode == "newton" else solved), tolerance=1e-2), **yardstick},
        check=check(mode),
        tolerance={torch.float32: 1e-3},
        flops=flops if mode == "newton" else lambda *args: 0.0,
        bytes=lambda q, v, landmarks: 4.0 * (2 * q.numel() + 2 * v.numel() + landmarks.numel()),
        memory="memory" in id,
        goals=goals,
        sweep=("tokens", sizes[2]) if "memory" in id else None,
    )


def make_layer(batch: int, dim: int, heads: int, ratio: int, kernel_size: int, side: int) -> Callable[[Draw], tuple]:
    """A layer with weights of a trained one's size, and tokens."""

    def draw_all(draw: Draw) -> tuple:
        layer = SoftmaxFreeAttention(dim, heads, ratio, kernel_size)
        for parameter in layer.parameters():
            width = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.data = width * torch.randn(parameter.shape, generator=draw.generator)
        layer.attn.Qnorm_act[0].weight.data += 1
        return draw.normal(batch, side * side, dim), layer.to(draw.device, draw.dtype).requires_grad_(False)

    return draw_all


def ours(x: torch.Tensor, layer: SoftmaxFreeAttention) -> torch.Tensor:
    """The layer."""
    return layer(x)


def published(x: torch.Tensor, layer: SoftmaxFreeAttention) -> torch.Tensor:
    """Heads apart, both convolutions on permuted copies, the formula between them."""
    (batch, tokens, dim), heads, parts = x.shape, layer.heads, layer.attn
    side, d = round(tokens**0.5), dim // heads
    q, v = (
        F.linear(x, w.weight.to(x), w.bias.to(x)).view(batch, tokens, heads, d).transpose(1, 2)
        for w in (layer.W_q, layer.W_v)
    )
    q = q / d**0.25
    image = q.reshape(batch * heads, side, side, d).permute(0, 3, 1, 2)
    found = F.conv2d(image, parts.Qlandmark_op.weight.to(x), stride=layer.ratio).flatten(2).transpose(1, 2)
    norm = parts.Qnorm_act[0]
    landmarks = F.gelu(F.layer_norm(found, (d,), norm.weight.to(x), norm.bias.to(x))).view(batch, heads, -1, d)
    y = formula(q * d**0.25, v, landmarks)
    image = v.reshape(batch, heads, side, side, d).permute(0, 4, 1, 2, 3).reshape(batch * d, heads, side, side)
    own = F.conv2d(image, parts.conv.weight.to(x), padding=layer.kernel_size // 2, groups=heads)
    y = y + own.reshape(batch, d, heads, tokens).permute(0, 2, 3, 1)
    return F.linear(y.transpose(1, 2).reshape(x.shape), layer.ff.weight.to(x), layer.ff.bias.to(x))


def check_layer(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    x, layer = args
    i = int(torch.randint(len(x), ()))
    want = published(x[i : i + 1].double(), layer)[0]
    return float((found[i].double() - want).abs().max() / want.square().mean().sqrt())


def layer_case(id: str, batch: int, *sizes: int) -> Case:
    """A stage of SOFT-Tiny."""
    return Case(
        op="softmax_free_attention",
        id=id,
        make=make_layer(batch, *sizes),
        small=make_layer(1, 16, 2, 2, 3, 4),
        ours=ours,
        peers={PUBLISHED: Peer(plain(published), tolerance=1e-2)},
        check=check_layer,
        tolerance={torch.float32: 1e-3},
    )


CASES = [
    function_case("N3136-h2-m49", 1, 2, 3136, 49, goals=(Goal("ratio", 3, FORMULA),)),
    function_case("N3136-h2-m49-near", 1, 2, 3136, 49, spread=0.05),
    function_case("N3136-h2-m49-solve", 1, 2, 3136, 49, mode="solve"),
    function_case("B8-N196-h10-m49", 8, 10, 196, 49),
    function_case("B8-N196-h10-m49-solve", 8, 10, 196, 49, mode="solve"),
    function_case("N12544-h2-m196", 1, 2, 12544, 196, goals=(Goal("ratio", 10, SDPA),)),
    *(function_case(f"memory-N{n}-h2-m49", 1, 2, n, 49) for n in (1024, 4096, 16384, 65536)),
    layer_case("layer-tiny-stage1-B1", 1, 64, 2, 8, 9, 56),
    layer_case("layer-tiny-stage2-B1", 1, 128, 4, 4, 5, 28),
    layer_case("layer-tiny-stage3-B1", 1, 320, 10, 2, 3, 14),
    layer_case("layer-tiny-stage1-B8", 8, 64, 2, 8, 9, 56),
    layer_case("layer-tiny-stage3-B8", 8, 320, 10, 2, 3, 14),
]
