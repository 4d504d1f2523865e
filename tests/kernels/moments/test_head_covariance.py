"""Cross-covariances of heads and the moment probing head: a float64 restatement, the published parameters, messages."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine.portable import _SinglePrecision
from planmill.kernels import cpu_capabilities, cpu_capability, ops
from planmill.kernels.moments import MomentProbingHead, RecalibrationAdapter, cross_covariance
from planmill.kernels.moments.head_covariance.cases import drawn


def restated(
    x: torch.Tensor, heads: list[list[int]], pairs: list[tuple[int, int]], norm: nn.LayerNorm | None, centering: str
) -> torch.Tensor:
    """One image and one pair at a time, float64; `heads` lists the channels of each. Columns not divided."""
    maps = []
    for tokens in x.double():
        parts = []
        for channels in heads:
            part = tokens[:, channels]
            if norm is not None:
                part = part - part.mean(1, keepdim=True)
                part = part / (part.square().mean(1, keepdim=True) + norm.eps).sqrt()
                part = part * norm.weight.detach().double() + norm.bias.detach().double()
            if centering == "scalar":
                part = part - part.sum() / part.numel()
            elif centering == "channel":
                part = part - part.sum(0) / len(part)
            parts.append(part)
        maps.append(torch.stack([torch.einsum("tm,tn->mn", parts[i], parts[j]) / len(tokens) for i, j in pairs]))
    return torch.stack(maps)


def unit_columns(maps: torch.Tensor) -> torch.Tensor:
    """F.normalize over the row index, as published."""
    return F.normalize(maps, dim=2)


def near(heads: int, d: int) -> list[list[int]]:
    return [list(range(q * d, (q + 1) * d)) for q in range(heads)]


def interleaved(heads: int, d: int) -> list[list[int]]:
    return [list(range(q, heads * d, heads)) for q in range(heads)]


def layer_norm(d: int, generator: torch.Generator) -> nn.LayerNorm:
    norm = nn.LayerNorm(d)
    norm.weight.data, norm.bias.data = (torch.randn(2, d, generator=generator) + 1).unbind()
    return norm


@pytest.mark.parametrize("centering", ["scalar", "channel", "none"])
@pytest.mark.parametrize("tokens", [1, 2, 49, 197, 300])
def test_equals_the_formula(generator: torch.Generator, centering: str, tokens: int) -> None:
    norm = layer_norm(24, generator)
    x = torch.randn(2, tokens, 96, generator=generator) * 3 + 2
    pairs = [(0, 1), (1, 2), (2, 3)]
    for crossed in (False, True):
        channels = interleaved(4, 24) if crossed else near(4, 24)
        want = restated(x, channels, pairs, norm, centering)
        got = cross_covariance(
            x,
            4,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            centering=centering,
            interleaved=crossed,
            normalize=False,
        )
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        if centering != "channel" or tokens > 2:  # what is zero has no direction
            got = cross_covariance(
                x, 4, norm_weight=norm.weight, norm_bias=norm.bias, centering=centering, interleaved=crossed
            )
            torch.testing.assert_close(got.double(), unit_columns(want), atol=1e-5, rtol=1e-5)


def test_a_covariance_far_from_the_origin(generator: torch.Generator) -> None:
    """Without a norm and about the channels' means it is a block of torch.cov, wherever the tokens lie."""
    x = torch.randn(1, 1000, 14, generator=generator) + 3000 * torch.randn(14, generator=generator)
    whole = torch.cov(x[0].double().T, correction=0)
    got = cross_covariance(x, 2, centering="channel", normalize=False)
    torch.testing.assert_close(got[0, 0].double(), whole[:7, 7:], atol=1e-5, rtol=1e-4)


def test_a_scalar_centre_is_no_channel_centre(generator: torch.Generator) -> None:
    """One number for all channels: with the norm's initial weights it is zero, and only then does it do nothing."""
    x = torch.randn(2, 30, 32, generator=generator)
    ones, zeros = torch.ones(8), torch.zeros(8)
    scalar, channel, none = (
        cross_covariance(x, 4, norm_weight=ones, norm_bias=zeros, centering=c) for c in ("scalar", "channel", "none")
    )
    torch.testing.assert_close(scalar, none, atol=1e-5, rtol=1e-5)
    assert float((scalar - channel).abs().max()) > 0.05
    moved = cross_covariance(x, 4, norm_weight=ones, norm_bias=zeros + 2)
    torch.testing.assert_close(moved, scalar, atol=1e-5, rtol=1e-5)


def test_constant_channels_give_zeros(generator: torch.Generator) -> None:
    """About their mean exactly zero, which the smallest length does not blow up."""
    x = torch.randn(1, 77, 8, generator=generator)
    x[:, :, 1], x[:, :, 6] = 0.1, 1 / 3
    maps = cross_covariance(x, 2, centering="channel")
    assert not maps[0, 0, 1].any()
    assert not maps[0, 0, :, 2].any()
    assert float(maps.abs().max()) > 0.1


@pytest.mark.parametrize("crossed", [False, True])
def test_images_do_not_depend_on_each_other(generator: torch.Generator, crossed: bool) -> None:
    """Bit for bit, whether an image is shared among threads or has one to itself; and whatever the strides."""
    norm = layer_norm(16, generator)
    x = torch.randn(5, 300, 48, generator=generator)

    def maps(x: torch.Tensor) -> torch.Tensor:
        return cross_covariance(x, 3, norm_weight=norm.weight, norm_bias=norm.bias, interleaved=crossed)

    with torch.no_grad():
        together = maps(x)
        for b in range(5):
            assert torch.equal(maps(x[b : b + 1]), together[b : b + 1])
        assert torch.equal(maps(x.transpose(1, 2).contiguous().transpose(1, 2)), together)
        x[1], x[3, 7] = torch.nan, torch.inf
        again = maps(x)
    for b in (0, 2, 4):
        assert torch.equal(again[b], together[b])
    assert bool(again[[1, 3]].isnan().all())


@pytest.mark.usefixtures("two_threads")
def test_random_shapes() -> None:
    spec = ops()["head_covariance"]
    for seed in range(80):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: float) -> float:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        batch, tokens = int(pick(1, 2, 5)), int(pick(1, 2, 3, 17, 49, 196, 255, 256, 257, 600))
        heads, d = int(pick(1, 2, 3, 4, 5)), int(pick(1, 3, 7, 8, 9, 16, 17, 33, 48, 49, 64, 100))
        norm, centering = bool(pick(0, 1, 1)), ("scalar", "channel", "none")[int(pick(0, 1, 2))]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[int(pick(0, 0, 1, 2))]
        args = drawn(
            dtype, g, batch, tokens, heads, d, norm=norm,
            centering=centering, pairing=("adjacent", "first", "halves", "all")[int(pick(0, 1, 2, 3))],
            interleaved=bool(pick(0, 1)), normalize=False, mean=pick(0, 0, 20), scale=pick(1, 3),
        )  # fmt: skip
        want = spec.reference(*args)
        # an entry is as good as the numbers that are summed in it
        z = args[0].double()
        scale = float((args[1].abs().max() * 4 + args[2].abs().max()) ** 2 if norm else (z - z.mean()).square().mean())
        scale += float(z.square().mean()) if centering == "none" and not norm else 0.0
        for level in cpu_capabilities():
            with cpu_capability(level):
                got = spec.op(*args)
            print(f"seed {seed}: {list(args[0].shape)} {args[3:]} {level}")  # shown where the comparison fails
            torch.testing.assert_close(got, want, atol=4e-6 * (scale + 1), rtol=1e-5)


PUBLISHED = {
    "vit": {"classifier1.weight": (10, 24), "classifier1.bias": (10,), "proj.weight": (512, 24)},
    "cnn": {
        "cls_head.norm.weight": (24,), "cls_head.norm.bias": (24,), "cls_head.fc.weight": (10, 24),
        "cls_head.fc.bias": (10,), "proj.weight": (512, 24, 1, 1),
    },
    "mlp": {"cls_head.fc.weight": (10, 24), "cls_head.fc.bias": (10,), "proj.weight": (512, 24, 1, 1)},
}  # fmt: skip
SHARED = {
    "proj.bias": (512,), "ln.weight": (128,), "ln.bias": (128,), "classifier2.weight": (10, 2883),
    "classifier2.bias": (10,), "downblocks.0.0.weight": (3, 3, 3, 3), "downblocks.0.2.weight": (3, 3, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("variant", ["vit", "cnn", "mlp"])
def test_head_has_the_published_parameters(variant: str) -> None:
    """Names and shapes of Moment_Probing_ViT, _CNN and _MLP at their default width (no licence: read, not run)."""
    head = MomentProbingHead(24, 10, variant=variant)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {**SHARED, **PUBLISHED[variant]}


def random_head(variant: str, generator: torch.Generator, pairing: str = "adjacent") -> MomentProbingHead:
    head = MomentProbingHead(20, 6, variant=variant, hidden=64, pairing=pairing)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (1 if parameter.dim() == 1 else 0.3)
    return head.eval().requires_grad_(False)


@pytest.mark.parametrize("pairing", ["adjacent", "all"])
@pytest.mark.parametrize("variant", ["vit", "cnn", "mlp"])
def test_head_equals_its_formula(generator: torch.Generator, variant: str, pairing: str) -> None:
    head = random_head(variant, generator, pairing)
    weights = {k: v.double() for k, v in head.state_dict().items()}
    x = torch.randn(3, 5 * 7, 20, generator=generator)
    if variant == "vit":
        cls = torch.randn(3, 20, generator=generator)
        got = head(cls, torch.cat([torch.full((3, 1, 20), 9.0), x], 1))
        first = F.linear(cls.double(), weights["classifier1.weight"], weights["classifier1.bias"])
    else:
        got = head(x.transpose(1, 2).reshape(3, 20, 5, 7))
        mean = x.double().mean(1)
        if variant == "cnn":
            mean = F.layer_norm(mean, (20,), weights["cls_head.norm.weight"], weights["cls_head.norm.bias"], 1e-6)
        first = F.linear(mean, weights["cls_head.fc.weight"], weights["cls_head.fc.bias"])
    z = F.linear(x.double(), weights["proj.weight"].flatten(1), weights["proj.bias"])
    channels = near(4, 16) if variant == "vit" else interleaved(4, 16)
    pairs = [(0, 1), (1, 2), (2, 3)] if pairing == "adjacent" else list(itertools.combinations(range(4), 2))
    maps = restated(z, channels, pairs, head.ln, "scalar")
    if pairing == "adjacent" or variant != "vit":
        maps = unit_columns(maps)
    maps = F.conv2d(
        F.gelu(F.conv2d(maps, weights["downblocks.0.0.weight"], stride=2)), weights["downblocks.0.2.weight"], stride=2
    )
    second = F.linear(maps.flatten(1), weights["classifier2.weight"], weights["classifier2.bias"])
    torch.testing.assert_close(got.double(), (first + second) / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_averages_in_float32(generator: torch.Generator, dtype: torch.dtype) -> None:
    head = random_head("vit", generator).to(dtype)
    exact = random_head("vit", generator)
    exact.load_state_dict({k: v.float() for k, v in head.state_dict().items()})
    cls, tokens = (torch.randn(2, *s, generator=generator).to(dtype) for s in ((20,), (30, 20)))
    got, want = head(cls, tokens), exact(cls.float(), tokens.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.2, rtol=0.05)


def test_adapter(generator: torch.Generator) -> None:
    adapter = RecalibrationAdapter(24, rank=5)
    x, branch = torch.randn(2, 2, 7, 24, generator=generator).unbind()
    g = (x.double() @ adapter.down.weight.double().T).clamp_min(0)
    w, b = g @ adapter.up_weight.weight.double().T, g @ adapter.up_bias.weight.double().T
    torch.testing.assert_close(adapter(x, branch).double(), b + (1 + w) * branch, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in RecalibrationAdapter(768).parameters()) == 36864  # per block of ViT-B, as published


def test_gradient_compile_and_export(generator: torch.Generator) -> None:
    head = random_head("cnn", generator).requires_grad_()
    x = torch.randn(3, 20, 5, 7, generator=generator, requires_grad=True)
    head(x).square().sum().backward()
    twin = random_head("cnn", generator)
    twin.load_state_dict(head.state_dict())
    twin.double().requires_grad_()
    z = x.detach().double().requires_grad_()
    mean = twin.cls_head["norm"](z.mean((2, 3)))
    tokens = twin.proj(z).flatten(2).transpose(1, 2).unflatten(2, (16, 4)).permute(0, 3, 1, 2)
    tokens = twin.ln(tokens)
    tokens = tokens - tokens.mean((2, 3), keepdim=True)
    maps = unit_columns(torch.einsum("bqtm,bqtn->bqmn", tokens[:, :3], tokens[:, 1:]) / 35)
    second = twin.classifier2(twin.downblocks[0](maps).flatten(1))
    ((twin.cls_head["fc"](mean) + second) / 2).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=2e-3, rtol=2e-3)
    for (name, mine), theirs in zip(head.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=5e-3, rtol=5e-3, msg=name)
    x = x.detach()
    with torch.no_grad():
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), head(x))
        program = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = torch.randn(5, 20, 5, 7, generator=generator)
        torch.testing.assert_close(program.module()(more), head(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: cross_covariance(x[0], 2),
            ValueError,
            r"head_covariance: x must be \[B, T, heads \* d\], got \[5, 8\]",
        ),
        (lambda x: cross_covariance(x.double(), 2), TypeError, "x must be float32.* got torch.float64"),
        (lambda x: cross_covariance(x, 3), ValueError, "heads must divide the 8 channels of x, got 3"),
        (lambda x: cross_covariance(x, 0), ValueError, "heads must divide the 8 channels of x, got 0"),
        (
            lambda x: cross_covariance(x, 2, centering="mean"),
            ValueError,
            "centering must be one of scalar, channel, none",
        ),
        (lambda x: cross_covariance(x, 2, pairing="n/2"), ValueError, "pairing must be one of adjacent, first, halves"),
        (lambda x: cross_covariance(x, 2, norm_weight=x[0, 0, :4]), ValueError, "must come together"),
        (
            lambda x: cross_covariance(x, 2, norm_weight=x[0, 0], norm_bias=x[0, 0]),
            ValueError,
            r"norm_weight must be \[4\], got \[8\]",
        ),
        (lambda x: MomentProbingHead(8, 2, hidden=24), ValueError, "split hidden into 7 channels or more, got 4"),
        (lambda x: MomentProbingHead(8, 2, variant="swin"), ValueError, "variant must be one of vit, cnn, mlp"),
        (
            lambda x: MomentProbingHead(8, 2)(x),
            ValueError,
            r"needs cls \[B, dim\] and tokens .* got \[2, 5, 8\] and none",
        ),
        (lambda x: MomentProbingHead(8, 2, variant="mlp")(x), ValueError, r"needs one feature map .* got \[2, 5, 8\]"),
        (lambda x: RecalibrationAdapter(8)(x, x[:1]), ValueError, r"must be \[\.\.\., 8\] and alike, got \[2, 5, 8\]"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 5, 8))  # type: ignore[operator]


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e15, 1e18])
def test_plans_without_plugins_keep_columns_whose_squares_leave_float32(scale: float) -> None:
    spec, nothing = ops()["head_covariance"], torch.empty(0)
    assert spec.portable is not None
    args = scale * torch.randn(2, 30, 40), nothing, nothing, 2, 1e-5, "scalar", "adjacent", False, True
    with _SinglePrecision():
        got = spec.load(spec.portable)(*args)
    torch.testing.assert_close(got, spec.reference(*args), atol=1e-6, rtol=1e-6)
