"""Gated linear attention against its dense form, its own parts and random draws; fla's and ViG's layers restated."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels import cpu_capabilities, cpu_capability, ops
from planmill.kernels.attention import (
    GatedLinearAttention,
    ViGAttention,
    attend_with_gates,
    stream_with_gates,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(batch: int, tokens: int, heads: int, keys: int, values: int, z: float = 0.0) -> list[torch.Tensor]:
    """q, k, v and the log gates of both directions."""
    q, k, v = (normal(batch, tokens, heads, d, seed=i) for i, d in enumerate((keys, keys, values)))
    return [q, k, v, *(F.logsigmoid(z + normal(batch, tokens, heads, keys, seed=i)) / 16 for i in (3, 4))]


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor | None = None
) -> torch.Tensor:
    """o_t = scale sum over s of (q_t . k_s decay) v_s, every pair at once, in float64.

    decay from s to t: exp of the sum of the gates s + 1 .. t (forward, s <= t) or t .. s - 1 (backward, s >= t).
    """
    q, k, v = q.double() * q.shape[3] ** -0.5, k.double(), v.double()
    tokens = torch.arange(q.shape[1])
    t, s = tokens[:, None], tokens[None]

    def attend(log_gates: torch.Tensor, between: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        decay = torch.einsum("tsu,buhc->btshc", between.double(), log_gates.double()).exp()
        return torch.einsum("bthc,bshc,btshc,bshv->bthv", q, k, decay * seen[None, :, :, None, None], v)

    u = tokens[None, None]
    out = attend(forward, (u > s[..., None]) & (u <= t[..., None]), s <= t)
    if backward is None:
        return out
    return (out + attend(backward, (u >= t[..., None]) & (u < s[..., None]), s >= t)) / 2


@pytest.mark.parametrize("z", [0.0, -100.0, 30.0], ids=["gates", "closing", "open"])
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_equals_its_dense_form(tokens: int, z: float) -> None:
    q, k, v, forward, backward = drawn(2, tokens, 2, 7, 10, z)
    torch.testing.assert_close(attend_with_gates(q, k, v, forward).double(), dense(q, k, v, forward), atol=1e-5, rtol=0)
    got = attend_with_gates(q, k, v, forward, backward_log_gates=backward).double()
    torch.testing.assert_close(got, dense(q, k, v, forward, backward), atol=1e-5, rtol=0)


@pytest.mark.parametrize("z", [0.0, -100.0], ids=["gates", "closing"])
def test_equals_the_naive_form_of_fla(z: float) -> None:
    """fla-core (MIT) is the oracle: its token-by-token recurrence, and both directions by flipping."""
    naive = importlib.import_module("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v, forward, backward = drawn(2, 33, 2, 16, 8, z)
    want, state = naive(q, k, v, forward, output_final_state=True)
    torch.testing.assert_close(attend_with_gates(q, k, v, forward), want, atol=2e-6, rtol=2e-6)
    out, left = stream_with_gates(q, k, v, forward, None)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(left, state, atol=2e-6, rtol=2e-6)
    flipped, _ = naive(*(x.flip(1) for x in (q, k, v, backward)))
    got = attend_with_gates(q, k, v, forward, backward_log_gates=backward)
    torch.testing.assert_close(got, (want + flipped.flip(1)) / 2, atol=2e-6, rtol=2e-6)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens", [64, 65, 300])
def test_bits_do_not_depend_on_batch_threads_or_later_tokens(tokens: int) -> None:
    q, k, v, forward, backward = drawn(3, tokens, 2, 32, 64)
    together = attend_with_gates(q, k, v, forward, backward_log_gates=backward)
    alone = attend_with_gates(*(x[1:2] for x in (q, k, v, forward)), backward_log_gates=backward[1:2])
    assert torch.equal(together[1:2], alone)
    torch.set_num_threads(1)  # other slices of the value channels
    assert torch.equal(attend_with_gates(q, k, v, forward, backward_log_gates=backward), together)
    whole = attend_with_gates(q, k, v, forward)
    for first in (1, 31, tokens - 1):
        assert torch.equal(attend_with_gates(*(x[:, :first] for x in (q, k, v, forward))), whole[:, :first])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_cut_anywhere_gives_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in drawn(2, 77, 3, 9, 20)[:4]]
    whole, last = stream_with_gates(*inputs)
    assert torch.equal(whole, attend_with_gates(*inputs))
    state, parts = None, []
    for first, after in ((0, 1), (1, 1), (1, 40), (40, 77)):
        part, state = stream_with_gates(*(x[:, first:after] for x in inputs), state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert state is not None
    assert torch.equal(state, last)


def test_nan_goes_forward_in_time_only() -> None:
    q, k, v, forward, _ = drawn(1, 40, 2, 8, 12)
    clean = attend_with_gates(q, k, v, forward)
    for tensor, entry in ((k, (0, 20, 1, 3)), (v, (0, 20, 1, 3)), (forward, (0, 20, 1, 3))):
        kept = tensor[entry].item()
        tensor[entry] = torch.nan
        got = attend_with_gates(q, k, v, forward)
        tensor[entry] = kept
        assert torch.equal(got[:, :20], clean[:, :20])
        assert torch.equal(got[:, :, 0], clean[:, :, 0])
        columns = slice(3, 4) if tensor is v else slice(None)
        assert got[:, 20:, 1, columns].isnan().all()


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 0, 8)], ids=["no_samples", "no_tokens"])
@pytest.mark.parametrize("kind", [GatedLinearAttention, ViGAttention])
def test_nothing_gives_nothing(kind: type, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = kind(8, 2)(x)
    y.sum().backward()
    assert y.shape == shape


def test_padding_changes_nothing() -> None:
    """k = 0 with an open gate, whatever q holds: as if the tokens were not there."""
    q, k, v, forward, backward = drawn(1, 50, 2, 8, 12)
    k[:, 30:], forward[:, 30:], backward[:, 30:], q[:, 30:] = 0, 0, 0, torch.nan
    padded = attend_with_gates(q, k, v, forward, backward_log_gates=backward)[:, :30]
    cut = attend_with_gates(*(x[:, :30] for x in (q, k, v, forward)), backward_log_gates=backward[:, :30])
    assert torch.equal(padded, cut)


@pytest.mark.usefixtures("two_threads")
def test_a_long_sequence() -> None:
    """65536 tokens; after 2000 gates near 0.96 nothing is left of a token, so a tail tells."""
    q, k, v, forward, backward = drawn(1, 65536, 1, 4, 8)
    got = attend_with_gates(q, k, v, forward, backward_log_gates=backward)
    spec, nothing = ops()["gated_linear_attention"], torch.empty(0)
    tail = [x[:, -2060:] for x in (q, k, v, forward, backward)]
    want = spec.reference(*tail, nothing, 0.5, False)[0]
    torch.testing.assert_close(got[:, -60:], want[:, -60:], atol=1e-5, rtol=1e-5)
    head = [x[:, :2060] for x in (q, k, v, forward, backward)]
    want = spec.reference(*head, nothing, 0.5, False)[0]
    torch.testing.assert_close(got[:, :60], want[:, :60], atol=1e-5, rtol=1e-5)


def test_random_sizes_gates_and_strides() -> None:
    """Against the definition on every instruction set. Errors are measured by the sum of absolute terms."""
    spec = ops()["gated_linear_attention"]
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: float) -> float:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        shape = [int(pick(1, 2, 3)), int(pick(1, 2, 15, 16, 17, 31, 33, 64, 70)), int(pick(1, 2, 3))]
        keys, values = int(pick(1, 2, 3, 5, 8, 9, 17, 32)), int(pick(1, 7, 8, 9, 16, 17, 33, 64))
        dtype = (torch.float32, torch.bfloat16, torch.float16)[int(pick(0, 0, 1, 2))]

        def tensor(width: int, gate: bool = False) -> torch.Tensor:
            x = torch.randn(*shape, width, generator=g) * pick(1, 10)  # noqa: B023
            x = F.logsigmoid(x * pick(1, 50) + pick(0, -100, 3)) / 16 if gate else x
            if gate and pick(0, 0, 1):
                x[torch.rand(x.shape, generator=g) < 0.1] = pick(-torch.inf, -1e4, 0)  # noqa: B023
            x = x.to(dtype)  # noqa: B023
            order = ((0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2))[int(pick(0, 1, 2))]
            return x.permute(order).contiguous().permute([order.index(i) for i in range(4)])

        both = bool(pick(0, 1))
        q, k, v, forward = tensor(keys), tensor(keys), tensor(values), tensor(keys, gate=True)
        backward = tensor(keys, gate=True) if both else torch.empty(0, dtype=dtype)
        state = (
            torch.randn(shape[0], shape[2], keys, values, generator=g) if not both and pick(0, 1) else torch.empty(0)
        )
        rest = (forward, backward, state, keys**-0.5, not both)
        want = spec.reference(q, k, v, *rest)
        sizes = spec.reference(q.abs().float(), k.abs().float(), v.abs().float(), *rest[:2], state.abs(), *rest[3:])
        for level in cpu_capabilities() or ("reference",):
            with cpu_capability(level):
                got = spec.op(q, k, v, *rest)
            for name, a, b, size in zip(("out", "state"), got, want, sizes, strict=True):
                last_bit = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[a.dtype]
                tiny = 1e-6 if a.dtype is torch.float16 else 0.0
                excess = (a.float() - b.float()).abs() - 3e-6 * size - 1.01 * last_bit * b.float().abs() - tiny
                assert (excess <= 0).all(), f"seed {seed}, {level}: {name} of {shape}, {keys}, {values}, {dtype}"


def restated_fla(layer: GatedLinearAttention, x: torch.Tensor) -> torch.Tensor:
    """fla's layer from its formulas, in float64."""
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    x = x.double()

    def heads(name: str, groups: int = 1) -> torch.Tensor:
        y = x @ w[name].T
        return y.unflatten(2, (layer.heads // groups, -1)).repeat_interleave(groups, 2)

    z = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    gates = (F.logsigmoid(z) / 16).unflatten(2, (layer.heads // layer.groups, -1)).repeat_interleave(layer.groups, 2)
    o = dense(heads("q_proj.weight"), heads("k_proj.weight", layer.groups), heads("v_proj.weight", layer.groups), gates)
    o = o * (o.square().mean(3, keepdim=True) + 1e-5).rsqrt() * w["g_norm_swish_gate.weight"]
    return (o * F.silu(heads("g_proj.weight"))).flatten(2) @ w["o_proj.weight"].T


def restated_vig(layer: ViGAttention, x: torch.Tensor, height: int, width: int, halved: float) -> torch.Tensor:
    """ViG's layer from its formulas, in float64."""
    w = {name: p.double() for name, p in layer.named_parameters()}
    dim = x.shape[2]
    picture = x.double().mT.unflatten(2, (height, width))
    u = F.silu(F.conv2d(picture, w["in_proj.0.weight"], padding=1, groups=dim)).flatten(2).mT
    q, k, v = (
        t.unflatten(2, (layer.heads, -1)) for t in (u @ w["qkv_proj.weight"].T).split([dim // 2, dim // 2, dim], 2)
    )
    z = u @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    gates = F.logsigmoid(z) / 16
    o = dense(q, k, v, *(t.unflatten(2, (layer.heads, -1)) for t in gates.chunk(2, 2))) * halved

    def norm(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y * (y.square().mean(3, keepdim=True) + 1e-6).rsqrt() * weight

    lam = torch.sigmoid(u @ w["g_proj.weight"].T + w["g_proj.bias"]).unflatten(2, (layer.heads, -1))
    y = lam * norm(o, w["g_norm.weight"]) + (1 - lam) * norm(u.unflatten(2, (layer.heads, -1)), w["l_norm.weight"])
    y = y.flatten(2)
    return (F.silu(y) if layer.out_activation else y) @ w["o_proj.weight"].T


def random_parameters(layer: nn.Module) -> nn.Module:
    """Weights of norms are ones when new: ones that no test would miss."""
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=index) * (1 if parameter.dim() == 1 else 0.4)
    return layer


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_flas_layer(kv_heads: int) -> None:
    """Restated from the formulas of flash-linear-attention (MIT); its naive recurrence is `dense`, token by token."""
    layer = GatedLinearAttention(16, 4, kv_heads=kv_heads)
    random_parameters(layer)
    x = normal(2, 19, 16, seed=50)
    torch.testing.assert_close(layer(x).double(), restated_fla(layer, x), atol=2e-5, rtol=2e-5)
    state = {name.replace("g_norm_swish_gate", "g_norm"): p for name, p in layer.state_dict().items()}
    again = GatedLinearAttention.from_fla(state, 4)  # as fla names it where norm and gate are not fused
    assert torch.equal(again(x), layer(x))
    first = layer.stream(x[:, :7])
    second = layer.stream(x[:, 7:], first.state)
    torch.testing.assert_close(torch.cat([first.out, second.out], 1), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("out_activation", "halved"), [(True, 1.0), (False, 0.5)])
def test_equals_vigs_layer(out_activation: bool, halved: float) -> None:
    """Restated from the formulas of hustvl/ViG (MIT), training form and inference form."""
    layer = ViGAttention(24, 3, out_activation=out_activation, halved_twice=halved < 1)
    random_parameters(layer)
    x = normal(2, 20, 24, seed=50)
    got = layer(x, 4, 5)
    torch.testing.assert_close(got.double(), restated_vig(layer, x, 4, 5, halved), atol=2e-5, rtol=2e-5)
    assert torch.equal(layer(x[:, :16]), layer(x[:, :16], 4, 4))
    again = ViGAttention.from_vig(layer.state_dict(), 3, out_activation=out_activation, halved_twice=halved < 1)
    assert torch.equal(again(x, 4, 5), got)


class Published(nn.Module):
    """The attributes by which the public layers say their arguments."""

    def __init__(self, layer: nn.Module, **attributes: object) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        for key, value in {
            "num_heads": layer.heads,
            "clamp_min": -0.5,
            "gate_logit_normalizer": 8,
            **attributes,
        }.items():
            setattr(self, key, value)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_bidirectional_layer_is_the_half_sum_of_both_directions(kv_heads: int) -> None:
    torch.manual_seed(0)
    layer = GatedLinearAttention(12, 2, kv_heads=kv_heads, bidirectional=True).double()
    assert layer.gk_proj_backward is not None
    x = normal(2, 9, 12).double()

    def apart(t: torch.Tensor) -> torch.Tensor:  # heads, each of k's, v's and the gates' for those that share it
        return t.unflatten(2, (kv_heads, -1)).repeat_interleave(2 // kv_heads, 2)

    q, k, v = layer.q_proj(x).unflatten(2, (2, -1)), apart(layer.k_proj(x)), apart(layer.v_proj(x))
    gates = [apart(F.logsigmoid(gate(x)) / 16) for gate in (layer.gk_proj, layer.gk_proj_backward)]
    o = dense(q, k, v, *gates)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.g_norm_swish_gate.weight
    want = layer.o_proj(o.flatten(2) * F.silu(layer.g_proj(x)))
    torch.testing.assert_close(layer.float()(x.float()).double(), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bidirectional layer needs all tokens at once"):
        layer.stream(x.float())


def test_arguments_are_read_from_a_module() -> None:
    published = Published(random_parameters(GatedLinearAttention(18, 3, key_ratio=1 / 3, eps=1e-3)))
    layer = GatedLinearAttention.from_fla(published)
    assert (layer.heads, layer.gate_divisor, layer.clamp_min, layer.g_norm_swish_gate.eps) == (3, 8.0, -0.5, 1e-3)
    assert layer.q_proj.weight is published.get_parameter("q_proj.weight")
    source = ViGAttention(18, 3, conv_activation=False, conv_bias=True, eps=1e-3)
    vig = ViGAttention.from_vig(Published(random_parameters(source), out_act=nn.SiLU()))
    assert (vig.heads, vig.gate_divisor, vig.clamp_min, vig.g_norm.eps, vig.out_activation) == (
        3,
        8.0,
        -0.5,
        1e-3,
        True,
    )
    assert isinstance(vig.in_proj[1], nn.Identity)
    assert vig.in_proj[0].bias is source.in_proj[0].bias


def test_gates_of_any_logit_are_exact() -> None:
    layer = GatedLinearAttention(8, 2)
    nn.init.zeros_(layer.gk_proj[1].weight)
    nn.init.constant_(layer.gk_proj[1].bias, -1e6)
    gates = layer._project(normal(1, 3, 8))[3]
    assert torch.equal(gates, torch.full_like(gates, -62500.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for layer in (GatedLinearAttention(32, 2), ViGAttention(32, 2)):
        half = layer.to(dtype)
        exact = type(layer)(32, 2)
        exact.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
        x = normal(2, 25, 32).to(dtype)
        got, want = half(x), exact(x.float())
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("make", [lambda: GatedLinearAttention(8, 2), lambda: ViGAttention(8, 2)], ids=["fla", "vig"])
def test_strides_samples_one_graph_and_gradient(make: object) -> None:
    layer = random_parameters(make()).eval()  # type: ignore[operator]
    x = normal(3, 9, 8, seed=9)
    wide = torch.full((3, 8, 18), torch.nan)[:, :, ::2].transpose(1, 2)
    wide.copy_(x)
    with torch.no_grad():
        want = layer(x)
        torch.testing.assert_close(layer(wide), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x[1:2]), want[1:2], atol=1e-5, rtol=1e-5)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
        more = normal(5, 9, 8, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))
    x.requires_grad_()
    layer(x).square().sum().backward()
    z = x.detach().double().requires_grad_()
    if isinstance(layer, ViGAttention):
        restated_vig(layer, z, 3, 3, 1.0).square().sum().backward()
    else:
        restated_fla(layer, z).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: attend_with_gates(q[0], q, q, q), ValueError, r"q must be \[B, N, H, dk\], got \[5, 2, 4\]"),
        (lambda q: attend_with_gates(q, q[:, 1:], q, q), ValueError, r"k must be \[2, 5, 2, 4\].* got \[2, 4, 2, 4\]"),
        (lambda q: attend_with_gates(q, q, q[:1], q), ValueError, r"v must be \[2, 5, 2, 'dv'\].* got \[1, 5, 2, 4\]"),
        (lambda q: attend_with_gates(q, q, q, q[..., :1]), ValueError, r"log_gates must be .* got \[2, 5, 2, 1\]"),
        (
            lambda q: attend_with_gates(q, q, q, q, backward_log_gates=q[:1]),
            ValueError,
            r"backward_log_gates must be .* got \[1, 5, 2, 4\]",
        ),
        (lambda q: attend_with_gates(*[q[..., :0]] * 4), ValueError, "dk at least 1"),
        (lambda q: attend_with_gates(*[q.double()] * 4), TypeError, "q must be float32.* got torch.float64"),
        (
            lambda q: attend_with_gates(q, q, q.half(), q),
            TypeError,
            "v must be torch.float32 like q, got torch.float16",
        ),
        (lambda q: attend_with_gates(q, q, q, q.half()), TypeError, "log_gates must be float32.* got torch.float16"),
        (lambda q: stream_with_gates(q, q, q, q, q), ValueError, r"state must be \[2, 2, 4, 4\].* got \[2, 5, 2, 4\]"),
        (lambda q: GatedLinearAttention(8, 3), ValueError, "heads must divide 4 key and 8 value channels, got 3"),
        (lambda q: GatedLinearAttention(8, 4, kv_heads=3), ValueError, "kv_heads must divide 4 heads, got 3"),
        (lambda q: GatedLinearAttention(8, 4, kv_heads=0), ValueError, "kv_heads must divide 4 heads, got 0"),
        (lambda q: GatedLinearAttention(8, 2)(q), ValueError, r"x must be \[B, N, 8\], got \[2, 5, 2, 4\]"),
        (lambda q: ViGAttention(8, 2)(q.flatten(2)), ValueError, "5 tokens are no square: height and width must"),
        (lambda q: ViGAttention(8, 2)(q.flatten(2), 2), ValueError, r"height \* width must be 5.* got 2 \* None"),
        (lambda q: ViGAttention(8, 2)(q.flatten(2)[:, :4], -2, -2), ValueError, r"must be 4.* got -2 \* -2"),
        (lambda q: ViGAttention(8, 2)(q.flatten(2), 2, 3), ValueError, r"height \* width must be 5.* got 2 \* 3"),
        (lambda q: GatedLinearAttention.from_fla({}), ValueError, "heads must be given"),
        (lambda q: ViGAttention.from_vig({"a": q}, 2), ValueError, "lacks in_proj.0.weight.* and holds a that"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 5, 2, 4))  # type: ignore[operator]
