"""gated_linear_attention in both directions at ViG's sizes, its causal form at GLA's, and ViG's layer.

Error: largest difference from float64 over one random head (of the layer: one random image), as a share of its largest
result.
"""

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.attention import ViGAttention, attend_with_gates

from ..cases import Case, Draw, Goal, Peer, plain

FP32, BF16 = torch.float32, torch.bfloat16
RECURRENCE = "recurrence, twice with flips"
CHUNKED = "chunked PyTorch, torch.compile, best chunk"


def make(
    tokens: int, batch: int = 1, heads: int = 3, keys: int = 32, values: int = 64, both: bool = True
) -> Callable[[Draw], tuple]:
    """q, k, v and gates as the layers make them."""

    def draw_all(draw: Draw) -> tuple:
        q, k = (draw.normal(batch, tokens, heads, keys) for _ in range(2))
        v = draw.normal(batch, tokens, heads, values)
        gates = [F.logsigmoid(draw.normal(batch, tokens, heads, keys)) / 16 for _ in range(2)]
        return q, k, v, gates[0], gates[1] if both else None

    return draw_all


def ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor | None
) -> torch.Tensor:
    """The public function."""
    return attend_with_gates(q, k, v, forward, backward_log_gates=backward)


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor | None
) -> torch.Tensor:
    """Token by token; the backward direction on flipped copies."""

    def scan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        q, k, v, gates = (x.transpose(1, 2) for x in (q.float() * q.shape[3] ** -0.5, k.float(), v.float(), gates))
        state, out, gates = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), [], gates.float().exp()
        for t in range(q.shape[2]):
            state = torch.addcmul(state * gates[:, :, t, :, None], k[:, :, t, :, None], v[:, :, t, None])
            out.append(torch.matmul(q[:, :, t, None], state))
        return torch.cat(out, 2).transpose(1, 2)

    out = scan(q, k, v, forward)
    if backward is not None:
        out = (out + scan(*(x.flip(1) for x in (q, k, v, backward))).flip(1)) / 2
    return out.to(v.dtype)


def prepare_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor | None, chunk: int
) -> tuple:
    """What needs no other chunk: each direction's decayed queries, states and decays, and the sums inside a chunk.

    It forms e^-b, which is fast and loses all where gates close; the gates drawn here stay open enough.
    """
    count = -(-q.shape[1] // chunk)
    kind = torch.float64 if q.dtype is torch.float64 else torch.float32

    def split(x: torch.Tensor) -> torch.Tensor:  # [B, N, H, d] -> [B, H, count, chunk, d]
        padded = F.pad(x.to(kind), (0, 0, 0, 0, 0, count * chunk - x.shape[1]))
        return padded.unflatten(1, (count, chunk)).permute(0, 3, 1, 2, 4)

    q, k, v = split(q) * (q.shape[3] ** -0.5 / (1 if backward is None else 2)), split(k), split(v)
    inside: torch.Tensor | None = None
    directions = []
    for reverse, gates in ((False, forward), (True, backward)):
        if gates is None:
            continue
        g = split(gates)
        b = g.cumsum(3)
        total = b[..., -1:, :]
        if reverse:
            b = total - b + g
        queries = q * b.exp()
        scores = queries @ (k * (-b).exp()).mT
        scores = scores.triu() if reverse else scores.tril()
        inside = scores if inside is None else inside + scores
        directions.append((queries, (k * (total - b).exp()).mT @ v, total.exp().mT))
    assert inside is not None
    return inside @ v, directions


def scan_chunks(directions: list[tuple]) -> list[torch.Tensor]:
    """The state that each chunk begins from, in each direction."""
    found = []
    for reverse, (_, made, decays) in enumerate(directions):
        state, states = torch.zeros_like(made[:, :, 0]), [made[:, :, 0]] * made.shape[2]
        for i in range(made.shape[2]):
            at = made.shape[2] - 1 - i if reverse else i
            states[at] = state
            state = torch.addcmul(made[:, :, at], decays[:, :, at], state)
        found.append(torch.stack(states, 2))
    return found


def finish_chunks(
    inside: torch.Tensor, directions: list[tuple], states: list[torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """Results of all tokens, in the order of `like`."""
    for (queries, _, _), state in zip(directions, states, strict=True):
        inside = inside + queries @ state
    return inside.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)


def chunked(*args: torch.Tensor | None, chunk: int = 64) -> torch.Tensor:
    """The chunked form, all of it."""
    inside, directions = prepare_chunks(*args, chunk)  # type: ignore[arg-type, misc]
    return finish_chunks(inside, directions, scan_chunks(directions), args[2])  # type: ignore[arg-type]


def compiled(*args: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    """The chunked form under torch.compile with the fastest chunk; beyond 16 chunks their scan is a loop outside."""
    tokens = args[0].shape[1]  # type: ignore[union-attr]
    calls = []
    for chunk in (64,) if tokens < 64 else (32, 64, 128) if tokens < 512 else (64, 128):
        torch.compiler.reset()
        if tokens <= 16 * chunk:
            whole = torch.compile(chunked, dynamic=False)
            calls.append(lambda whole=whole, chunk=chunk: whole(*args, chunk=chunk))
        else:
            first, last = torch.compile(prepare_chunks, dynamic=False), torch.compile(finish_chunks, dynamic=False)

            def call(first: Callable = first, last: Callable = last, chunk: int = chunk) -> torch.Tensor:
                inside, directions = first(*args, chunk)
                return last(inside, directions, scan_chunks(directions), args[2])

            calls.append(call)
        calls[-1]()
    return fastest(calls)


def fastest(calls: list[Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    """The call with the least time of five."""
    times = [float("inf")] * len(calls)
    for _ in range(5):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[i] = min(times[i], time.perf_counter() - start)
    return calls[times.index(min(times))]


def fla(name: str) -> Callable[..., Callable[[], torch.Tensor]]:
    """flash-linear-attention's function, twice with flips where there are two directions."""

    def prepare(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        from fla.ops import gla

        function = getattr(gla, name)

        def call() -> torch.Tensor:
            out = function(q, k, v, forward)[0]
            if backward is None:
                return out
            return (out + function(*(x.flip(1) for x in (q, k, v, backward)))[0].flip(1)) / 2

        return call

    return prepare


def check(args: tuple, found: torch.Tensor) -> float:
    """One random head in float64."""
    b, h = int(torch.randint(len(found), ())), int(torch.randint(found.shape[2], ()))
    head = [None if x is None else x[b : b + 1, :, h : h + 1].double() for x in args]
    want = chunked(*head)
    return float((found[b : b + 1, :, h : h + 1].double() - want).abs().max() / want.abs().max())


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, backward: object) -> float:
    """Decay, outer product and query of each token's state: 5 operations an element, in each direction."""
    return 5.0 * q.numel() * v.shape[3] * (1 if backward is None else 2)


def make_layer(batch: int, dim: int, heads: int) -> Callable[[Draw], tuple]:
    """ViG's layer and 14 x 14 tokens, normalised as they come."""

    def draw_all(draw: Draw) -> tuple:
        layer = ViGAttention(dim, heads, out_activation=True)
        for parameter in layer.parameters():
            near = 1.0 if parameter.shape == (dim // heads,) else 0.0
            parameter.data = near + draw.normal(*parameter.shape).float().cpu() * parameter[0].numel() ** -0.5
        return draw.normal(batch, 196, dim), layer.to(draw.device, draw.dtype).requires_grad_(False)

    return draw_all


def layer_formula(x: torch.Tensor, layer: ViGAttention, chunk: int = 64) -> torch.Tensor:
    """The layer in PyTorch operators around the chunked form."""
    heads, dim, kind = layer.heads, x.shape[2], x.dtype
    weights = {name: p.to(kind) for name, p in layer.named_parameters()}
    picture = x.mT.unflatten(2, (14, 14))
    u = F.silu(F.conv2d(picture, weights["in_proj.0.weight"], padding=1, groups=dim)).flatten(2).mT
    q, k, v = (
        t.unflatten(2, (heads, -1)) for t in F.linear(u, weights["qkv_proj.weight"]).split([dim // 2, dim // 2, dim], 2)
    )
    z = F.linear(F.linear(u, weights["gk_proj.0.weight"]), weights["gk_proj.1.weight"], weights["gk_proj.1.bias"])
    gates = F.logsigmoid(z) / 16
    o = chunked(q, k, v, *(t.unflatten(2, (heads, -1)) for t in gates.chunk(2, 2)), chunk=chunk)
    lam = F.linear(u, weights["g_proj.weight"], weights["g_proj.bias"]).sigmoid().unflatten(2, (heads, -1))
    width = (dim // heads,)
    near = F.rms_norm(u.unflatten(2, (heads, -1)), width, weights["l_norm.weight"], 1e-6)
    y = lam * F.rms_norm(o, width, weights["g_norm.weight"], 1e-6) + (1 - lam) * near
    return F.linear(F.silu(y.flatten(2)), weights["o_proj.weight"])


def compiled_layer(x: torch.Tensor, layer: ViGAttention) -> Callable[[], torch.Tensor]:
    """The formula under torch.compile, with the fastest of some chunks."""
    calls = []
    for chunk in (64, 128) if x.shape[2] > 16 else (64,):
        call = torch.compile(layer_formula, dynamic=False)
        call(x, layer, chunk)
        calls.append(lambda call=call, chunk=chunk: call(x, layer, chunk))
    return fastest(calls)


def check_layer(args: tuple, found: torch.Tensor) -> float:
    """One random image in float64."""
    x, layer = args
    i = int(torch.randint(len(x), ()))
    want = layer_formula(x[i : i + 1].double(), layer)
    return float((found[i].double() - want[0]).abs().max() / want.abs().max())


def flops_layer(x: torch.Tensor, layer: ViGAttention) -> float:
    """Two operations a weight and token, and both directions."""
    dim = x.shape[2]
    weights = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    return x[..., 0].numel() * (2.0 * weights + 10.0 * dim // 2 * dim / layer.heads)


LOOP = {RECURRENCE: Peer(plain(recurrence), tolerance=2e-2)}
CHUNKS = {CHUNKED: Peer(compiled, tolerance=2e-2)}
FLA = {
    f"fla {name}": Peer(fla(name), package="fla", devices=("cuda",), tolerance=3e-2)
    for name in ("chunk_gla", "fused_recurrent_gla")
}
GOALS = (Goal("ratio", 10.0, RECURRENCE, FP32), Goal("ratio", 2.0, CHUNKED, FP32))

CASES = [
    Case(
        op="gated_linear_attention",
        id=f"{'both' if both else 'causal'}-B{batch}-N{tokens}-H{heads}-dk{keys}-dv{values}",
        make=make(tokens, batch, heads, keys, values, both),
        small=make(40, 1, 2, 8, 8, both),
        ours=ours,
        peers={**(LOOP if tokens <= 1024 and both else {}), **CHUNKS, **FLA},
        check=check,
        tolerance={FP32: 1e-5, BF16: 1e-2},
        flops=flops,
        dtypes=(FP32, BF16) if tokens in (196, 4096) else (FP32,),
        goals=GOALS if (batch, tokens, both) == (1, 196, True) else (),
        memory=tokens >= 1024,
    )
    for batch, tokens, heads, keys, values, both in (
        (1, 196, 3, 32, 64, True),
        (8, 196, 3, 32, 64, True),
        (1, 1024, 3, 32, 64, True),
        (1, 4096, 3, 32, 64, True),
        (1, 16384, 3, 32, 64, True),
        (1, 65536, 3, 32, 64, True),
        (1, 1024, 4, 128, 256, False),
    )
] + [
    Case(
        op="gated_linear_attention",
        id=f"ViG-{name}-layer-B{batch}-N196-D{dim}",
        make=make_layer(batch, dim, heads),
        small=make_layer(1, 16, 2),
        ours=lambda x, layer: layer(x),
        peers={
            "PyTorch, chunked": Peer(plain(layer_formula), tolerance=5e-2),
            "the same, torch.compile, best chunk": Peer(compiled_layer, tolerance=5e-2),
        },
        check=check_layer,
        tolerance={FP32: 2e-5, BF16: 3e-2},
        flops=flops_layer,
    )
    for name, batch, dim, heads in (("T", 1, 192, 3), ("T", 8, 192, 3), ("B", 1, 768, 12))
]
