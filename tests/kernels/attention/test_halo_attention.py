"""HaloAttention against timm's module, attend_to_halo against its definition on random draws, and their messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planmill.kernels import find_conversion, ops, which
from planmill.kernels.attention import HaloAttention, attend_to_halo
from planmill.kernels.attention.halo_attention.cases import drawn
from planmill.kernels.attention.halo_attention.reference import halo_attention_reference
from planmill.kernels.common import backends

CONFIGURATIONS: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # dim, H, W, arguments
    "8_halo_1": (24, 16, 8, {"num_heads": 1, "halo_size": 1}),
    "8_halo_2_strided": (32, 16, 16, {"num_heads": 8, "halo_size": 2, "stride": 2, "dim_head": 16}),
    "8_halo_3_biased": (16, 8, 24, {"num_heads": 2, "qkv_bias": True, "scale_pos_embed": True}),
    "8_averaged": (16, 8, 16, {"num_heads": 2, "halo_size": 1, "stride": 2, "avg_down": True}),
    "7_halo_2": (24, 7, 14, {"dim_out": 48, "num_heads": 4, "block_size": 7, "halo_size": 2, "qk_ratio": 0.33}),
    "7_halo_3_strided": (16, 14, 7, {"num_heads": 2, "block_size": 7, "halo_size": 3, "stride": 2}),
}


def pair(name: str) -> tuple[nn.Module, HaloAttention, torch.Tensor]:
    """timm's module with random weights, ours with copies of them, and an input."""
    from timm.layers.halo_attn import HaloAttn

    dim, height, width, arguments = CONFIGURATIONS[name]
    torch.manual_seed(0)
    theirs = HaloAttn(dim, **arguments)
    mine = HaloAttention(dim, **arguments)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, torch.randn(2, dim, height, width)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_timm(name: str) -> None:
    """Oracle: timm 1.0's HaloAttn (Apache-2.0) in float64; values in each dtype, gradients of x and every parameter."""
    theirs, mine, x = pair(name)
    theirs = theirs.double()
    y, z = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = mine(y), theirs(z)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)
    weights = torch.randn(want.shape)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(y.grad.double(), z.grad, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]
    for (path, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None, path
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-3, rtol=1e-4)
    for dtype, loose in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):  # the convolutions round q, k and v
        half = HaloAttention(CONFIGURATIONS[name][0], **CONFIGURATIONS[name][3], dtype=dtype)
        half.load_state_dict(mine.state_dict())
        with torch.no_grad():
            got = half(x.to(dtype))
        assert got.dtype is dtype
        assert (got.double() - want).norm() < loose * want.norm()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_definition_is_timm_s(name: str) -> None:
    """The reference in float64 throughout, to the last digits. Oracle: timm's HaloAttn (Apache-2.0)."""
    theirs, mine, x = pair(name)
    theirs, mine, x = theirs.double(), mine.double(), x.double()
    q = mine.q(x).unflatten(1, (mine.num_heads, -1))
    k, v = mine.kv(x).unflatten(1, (mine.num_heads, -1)).split([mine.dim_head_qk, mine.dim_head_v], 2)
    y = halo_attention_reference(
        q, k, v, mine.pos_embed.height_rel, mine.pos_embed.width_rel, mine.block_size, mine.halo_size,
        mine.query_stride, mine.dim_head_qk**-0.5, False, mine.scale_pos_embed,
    ).flatten(1, 2)  # fmt: skip
    y = nn.functional.avg_pool2d(y, 2) if mine.pooled else y
    torch.testing.assert_close(y, theirs(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_module_of_timm_becomes_the_layer(name: str) -> None:
    theirs, _, x = pair(name)
    build = find_conversion(theirs.eval())
    assert build is not None
    layer = build(theirs)
    assert isinstance(layer, HaloAttention)
    assert not layer.training
    for path, parameter in theirs.named_parameters():
        assert layer.get_parameter(path) is parameter
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x), atol=2e-5, rtol=1e-5)


def test_masked_keys_outside_the_image() -> None:
    """One block: attention of plain PyTorch over its own pixels, with both positional terms as a bias."""
    q, k, v, rel_h, rel_w, *_ = drawn(torch.float32, torch.Generator().manual_seed(1), 2, 3, 5, 4, 1, 1, 4, 2)
    got = attend_to_halo(q, k, v, rel_h, rel_w, block=4, halo=2, pad_mode="mask")
    y, x = torch.arange(16) // 4, torch.arange(16) % 4
    tokens = q.flatten(3).mT
    rows = tokens @ rel_h.T  # [B, heads, 16, 15]
    columns = tokens @ rel_w.T
    offset = 7 + 2  # win - 1, and the halo before the block's first pixel
    bias = rows.gather(3, (y[None] - y[:, None] + offset).expand(2, 3, 16, 16))
    bias = bias + columns.gather(3, (x[None] - x[:, None] + offset).expand(2, 3, 16, 16))
    want = nn.functional.scaled_dot_product_attention(tokens, k.flatten(3).mT, v.flatten(3).mT, attn_mask=bias)
    torch.testing.assert_close(got, want.mT.unflatten(3, (4, 4)), atol=1e-5, rtol=1e-5)


def test_a_sample_alone_and_in_a_batch() -> None:
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=2).eval()
    x = torch.randn(3, 16, 8, 12)
    with torch.no_grad():
        k, q = layer.kv(x).unflatten(1, (2, 16)), layer.q(x).unflatten(1, (2, 8))
        tables = layer.pos_embed.height_rel, layer.pos_embed.width_rel

        def attend(at: slice) -> torch.Tensor:
            return attend_to_halo(q[at], k[at, :, :8], k[at, :, 8:], *tables, block=4, halo=2)

        alone = attend(slice(1, 2))
        assert torch.equal(attend(slice(None))[1:2], alone)
        q[0], k[2] = torch.nan, torch.inf
        assert torch.equal(attend(slice(None))[1:2], alone)
        x[0], x[2] = torch.nan, torch.inf
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))  # torch may choose another convolution for a batch
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last))[1:2], layer(x[1:2]))


@pytest.mark.parametrize("pad_mode", ["zero", "mask"])
def test_nan_is_seen_where_the_window_reaches(pad_mode: str) -> None:
    q, k, v, rel_h, rel_w, *_ = drawn(torch.float32, torch.Generator().manual_seed(2), 1, 1, 4, 3, 3, 3, 4, 1)
    k[0, 0, 2, 4, 3] = torch.nan  # row 4: the second row of blocks, and the halo of the first; column 3: likewise
    y = attend_to_halo(q, k, v, rel_h, rel_w, block=4, halo=1, pad_mode=pad_mode)
    seen = y.isnan()[0, 0].all(0)
    want = torch.zeros(12, 12, dtype=torch.bool)
    want[:8, :8] = True
    assert torch.equal(seen, want)
    assert torch.equal(y.isnan()[0, 0].any(0), want)


def test_one_graph_and_export_with_a_dynamic_batch() -> None:
    torch.compiler.reset()
    layer = HaloAttention(16, 24, stride=2, num_heads=2, block_size=4, halo_size=1).eval()
    x = torch.randn(2, 16, 8, 4)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 16, 8, 4)
        torch.testing.assert_close(program.module()(more), layer(more))


def test_random_draws() -> None:
    """Random sizes, strides, kinds of data and options against the definition, on this machine's instruction set."""
    spec = ops()["halo_attention"]
    for seed in range(70):
        args = random_arguments(seed)
        got, want = spec.op(*args), spec.reference(*args)
        print(f"seed {seed}: {[list(a.shape) if isinstance(a, torch.Tensor) else a for a in args]}")
        loose = 2e-5 * max(1.0, float(want.nan_to_num(0, 0, 0).abs().amax()) if want.numel() else 1.0)
        torch.testing.assert_close(got, want, atol=loose, rtol=1e-5, equal_nan=True)


def random_arguments(seed: int) -> tuple:
    """Arguments of the op; logits stay below some hundred, where a float32 logit still fixes e^logit to 1e-5."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: float) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    stride = pick(1, 1, 2, 3)
    args = drawn(
        torch.float32, g, pick(1, 1, 2, 3), pick(1, 2, 5), pick(1, 2, 7, 8, 12, 33), pick(1, 3, 6, 8, 13, 16, 40),
        pick(1, 1, 2, 3), pick(1, 2, 3, 5), stride * pick(1, 2, 3, 4), pick(0, 1, 2, 3, 6), stride,
        masked=bool(pick(0, 1)), scale_positions=bool(pick(0, 1)), scale=pick(1.0, 0.3, -0.5, 0.0),
        mean=pick(0.0, 0.0, 1.0),
    )  # fmt: skip
    tensors = list(args[:5])
    for index in range(3):
        if pick(0, 1):  # channels-last, or rows and columns exchanged
            order = pick((0, 3, 4, 1, 2), (0, 1, 2, 4, 3))  # type: ignore[arg-type]
            back = [order.index(i) for i in range(5)]
            tensors[index] = tensors[index].permute(order).contiguous().permute(back)
        if pick(0, 0, 0, 0, 1) and tensors[index].numel():
            at = tuple(int(torch.randint(n, (1,), generator=g)) for n in tensors[index].shape)
            # an infinite value times a weight below float32's range is NaN, but infinite in float64
            tensors[index][at] = pick(torch.nan, 80.0) if index == 2 else pick(torch.nan, torch.inf, -torch.inf, 20.0)
    return (*tensors, *args[5:])


def arguments() -> dict[str, torch.Tensor]:
    q, k, v, rel_h, rel_w, *_ = drawn(torch.float32, torch.Generator(), 1, 2, 3, 4, 2, 1, 4, 1)
    return {"q": q, "k": k, "v": v, "rel_h": rel_h, "rel_w": rel_w}


def call(block: int = 4, halo: int = 1, **changed: Any) -> torch.Tensor:
    options = {name: changed.pop(name) for name in ("stride", "pad_mode") if name in changed}
    return attend_to_halo(**(arguments() | changed), block=block, halo=halo, **options)


A = arguments()


def test_heads_too_wide_for_the_gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher runs the definition, before it needs a GPU, and `which` says so."""
    d, pixels = 257, (4, 2)
    q, k, v = (torch.randn(1, 1, d, *pixels) for _ in range(3))
    args = (q, k, v, torch.randn(7, d), torch.randn(7, d), 2, 1, 1, 0.1, True, False)
    spec = ops()["halo_attention"]
    assert torch.equal(spec.load(str(spec.cuda))(*args), halo_attention_reference(*args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_installed", lambda name: True)
    assert which("halo_attention", "cuda").missing == ("the reference for heads of more than 256 channels",)


MESSAGES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: call(q=A["q"][0]), ValueError, r"halo_attention: q must be \[B, heads, d, H, W\], got \[2, 3, 8, 4\]"),
    (lambda: call(q=A["q"].double()), TypeError, "q must be float32, bfloat16 or float16, got torch.float64"),
    (lambda: call(v=A["v"].half()), TypeError, "v must be torch.float32 like q, got torch.float16"),
    (lambda: call(k=A["k"].to("meta")), ValueError, "k must be on cpu like q, got meta"),
    (lambda: call(rel_h=A["rel_h"].to("meta")), ValueError, "rel_h must be on cpu like q, got meta"),
    (lambda: call(rel_w=A["rel_w"].int()), TypeError, "rel_w must be float32"),
    (lambda: call(rel_h=A["rel_h"][1:]), ValueError, r"rel_h must be \[11, 3\], \[2 win - 1, d\], got \[10, 3\]"),
    (
        lambda: call(q=A["q"][..., 1:]),
        ValueError,
        r"q must be \[1, 2, 3, 8, 4\] for k \[1, 2, 3, 8, 4\] at stride 1, got",
    ),
    (lambda: call(v=A["v"][:, :1]), ValueError, r"v must be \[1, 2, 'dv', 8, 4\] like k, got \[1, 1, 4, 8, 4\]"),
    (lambda: call(block=3), ValueError, "H and W of k must be multiples of block 3, got H 8, W 4"),
    (
        lambda: call(stride=3),
        ValueError,
        "block must be a positive multiple of stride .* got block 4, halo 1, stride 3",
    ),
    (lambda: call(halo=-1), ValueError, "halo at least 0, got block 4, halo -1"),
    (lambda: call(pad_mode="wrap"), ValueError, "pad_mode must be one of zero, mask, got 'wrap'"),
    (lambda: call(q=A["q"][:, :, :0], k=A["k"][:, :, :0]), ValueError, "q must have at least one channel a head"),
    (lambda: HaloAttention(10, num_heads=4), ValueError, "dim_out must be a multiple of num_heads 4, got 10"),
    (lambda: HaloAttention(8, num_heads=0), ValueError, "dim_out must be a multiple of num_heads 0, got 8"),
    (lambda: HaloAttention(8, block_size=0), ValueError, "block_size must be at least 1, .* got 0, 3"),
    (lambda: HaloAttention(8, stride=3), ValueError, "HaloAttention: stride must be 1 or 2, got 3"),
    (lambda: HaloAttention(8, pad_mode="wrap"), ValueError, "HaloAttention: pad_mode must be one of zero, mask"),
    (lambda: HaloAttention(8)(torch.zeros(1, 7, 8, 8)), ValueError, r"x must be \[B, 8, H, W\], got \[1, 7, 8, 8\]"),
    (
        lambda: HaloAttention(8)(torch.zeros(1, 8, 8, 12)),
        ValueError,
        "HaloAttention: H and W must be multiples of block_size 8, got H 8, W 12",
    ),
    (lambda: HaloAttention.from_timm(nn.Linear(1, 1)), ValueError, "module must be timm's HaloAttn, got Linear"),
]


@pytest.mark.parametrize(("run", "error", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_messages(run: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()
