"""SoftMoE against the published forms, weigh_slots against its definition on random draws, and their messages."""

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels import ops
from planmill.kernels.routing import SoftMoE, weigh_slots


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vmoe_weights(dim: int, experts: int, slots: int, hidden: int) -> dict:
    return {
        "Router": {"mu": normal(dim, experts, slots, seed=1), "scale": torch.tensor(3.0)},
        "Mlp/Dense_0": {"kernel": normal(experts, dim, hidden, seed=2) * 0.3, "bias": normal(experts, hidden, seed=3)},
        "Mlp/Dense_1": {"kernel": normal(experts, hidden, dim, seed=4) * 0.3, "bias": normal(experts, dim, seed=5)},
    }


def published_vmoe(x: torch.Tensor, weights: dict) -> torch.Tensor:
    """The vmoe block in float64, written from its formulas: unit tokens and slots, scaled logits, raw values."""

    def unit(t: torch.Tensor, dim: int) -> torch.Tensor:
        return t * (t.square().sum(dim, keepdim=True) + 1e-6).rsqrt()

    router, first, second = ({k: v.double() for k, v in part.items()} for part in weights.values())
    x = x.double()
    logits = torch.einsum("gmd,dnp->gmnp", unit(x, -1), unit(router["mu"], 0)) * router["scale"]
    slots = torch.einsum("gmnp,gmd->gnpd", logits.softmax(1), x)
    h = torch.einsum("gnpd,ndf->gnpf", slots, first["kernel"]) + first["bias"][None, :, None]
    h = torch.einsum("gnpf,nfd->gnpd", F.gelu(h, approximate="tanh"), second["kernel"]) + second["bias"][None, :, None]
    return torch.einsum("gmnp,gnpd->gmd", logits.flatten(2).softmax(2).view(logits.shape), h)


def random_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Norms' gammas are ones when new: a weight that no test would miss."""
    for index, parameter in enumerate(module.parameters()):
        if parameter.dim() == 1:
            parameter.data = normal(*parameter.shape, seed=index)
    return module.eval()


@pytest.mark.parametrize("geglu", [False, True], ids=["mlp", "geglu"])
@pytest.mark.parametrize("layernorm", [False, True], ids=["rms", "layer"])
def test_equals_soft_moe_pytorch(geglu: bool, layernorm: bool) -> None:
    """Oracle: soft-moe-pytorch 0.1.9 (MIT), with random weights, gammas included."""
    package = pytest.importorskip("soft_moe_pytorch")
    theirs = package.SoftMoE(dim=24, num_slots=5, num_experts=3, geglu=geglu, use_layernorm=layernorm)
    random_parameters(theirs)
    mine = SoftMoE.from_soft_moe_pytorch(theirs)
    x = normal(2, 17, 24, seed=9)
    mask = torch.arange(17) < torch.tensor([[17], [11]])
    image = normal(2, 24, 3, 5, seed=10)
    with torch.no_grad():
        theirs.double()
        torch.testing.assert_close(mine(x).double(), theirs(x.double()), atol=2e-5, rtol=1e-5)
        got, want = mine(x, mask).double(), theirs(x.double(), mask)
        torch.testing.assert_close(got[mask], want[mask], atol=2e-5, rtol=1e-5)
        assert not got[~mask].any(), "padding comes back as zero"
        torch.testing.assert_close(mine(image).double(), theirs(image.double()), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine(x[:, 0]).double(), theirs(x[:, 0].double()), atol=2e-5, rtol=1e-5)
        again = SoftMoE.from_soft_moe_pytorch(theirs.float().state_dict())
        assert torch.equal(again(x), mine(x))


def test_equals_vmoe() -> None:
    """Oracle: the formulas of google-research/vmoe (Apache-2.0), restated in float64."""
    weights = vmoe_weights(20, 3, 4, 28)
    layer = SoftMoE.from_vmoe(weights)
    x = normal(2, 9, 20)
    x[0, 3] = 0  # a zero token: eps stands inside the root
    torch.testing.assert_close(layer(x).double(), published_vmoe(x, weights), atol=1e-5, rtol=1e-5)
    flat = {f"encoder/{a}/{b}": v.numpy() for a, part in weights.items() for b, v in part.items()}
    assert torch.equal(SoftMoE.from_vmoe(flat)(x), layer(x))


def test_la_softmoe_is_linear_attention_over_slots() -> None:
    layer = SoftMoE(16, 2, 3, 24, form="plain", weighting="linear")
    x = normal(2, 11, 16)
    keys = layer.slot_embeds.detach().double().flatten(0, 1)
    logits = x.double() @ keys.T
    standard = F.instance_norm(logits.transpose(1, 2)).transpose(1, 2)
    phi = F.elu(standard) + 1
    slots = logits.softmax(1).mT @ x.double()
    up, up_bias, down, down_bias = (p.detach().double() for p in (layer.up, layer.up_bias, layer.down, layer.down_bias))
    outs = [
        F.linear(F.gelu(F.linear(slots[:, 3 * e : 3 * e + 3], up[e], up_bias[e])), down[e], down_bias[e])
        for e in (0, 1)
    ]
    want = phi / phi.sum(2, keepdim=True) @ torch.cat(outs, 1)
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["l2", "rms", "layer", "plain"])
@pytest.mark.parametrize("weighting", ["softmax", "linear"])
def test_images_do_not_depend_on_each_other(form: str, weighting: str) -> None:
    layer = SoftMoE(16, 4, 3, 24, form=form, weighting=weighting)
    x = normal(3, 13, 16)
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[1, 8:] = False
    with torch.no_grad():
        alone = layer(x[1:2], mask[1:2])
        cut = layer(x[1:2, :8])
        x[0], x[2, 4], x[1, 9] = torch.nan, torch.inf, torch.nan
        together = layer(x, mask)
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(alone[:, :8], cut, atol=1e-5, rtol=1e-5)  # padding is as if it were not there
    assert together[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_logits_in_float32(dtype: torch.dtype) -> None:
    """Logits reach some hundred with RMSNorm: rounded to 16 bits, the weights would be off by factors."""
    layer = SoftMoE(64, 2, 4, 48, form="rms").to(dtype)
    x = normal(2, 21, 64).to(dtype)
    exact = SoftMoE(64, 2, 4, 48, form="rms")
    exact.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    got, want = layer(x), exact(x.float())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.02)


def test_gradient_and_one_graph() -> None:
    """Gradients of every parameter, and torch.compile(fullgraph=True) and export with a dynamic batch."""
    layer = SoftMoE(8, 2, 3, 12, form="rms", gated=True)
    x = normal(3, 7, 8).requires_grad_()
    layer(x).square().sum().backward()
    twin = SoftMoE(8, 2, 3, 12, form="rms", gated=True).double()
    twin.load_state_dict(layer.state_dict())
    z = x.detach().double().requires_grad_()
    published_rms(z, twin).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-4, rtol=1e-4)
    for (name, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},))
        more = normal(5, 7, 8, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


def published_rms(x: torch.Tensor, layer: SoftMoE) -> torch.Tensor:
    """soft-moe-pytorch's formula in the dtype of x, gate first, for gradients."""
    width = x.shape[-1] ** 0.5
    t = F.normalize(x, dim=-1) * width * layer.gamma
    keys = F.normalize(layer.slot_embeds, dim=-1) * width * layer.slot_gamma
    logits = torch.einsum("bnd,esd->bnes", t, keys)
    slots = torch.einsum("bnd,bnes->besd", t, logits.softmax(1))
    h = torch.einsum("besd,efd->besf", slots, layer.up) + layer.up_bias[None, :, None]
    gate, value = h.chunk(2, dim=-1)
    h = torch.einsum("besf,edf->besd", F.gelu(gate) * value, layer.down) + layer.down_bias[None, :, None]
    return torch.einsum("besd,bnes->bnd", h, logits.flatten(2).softmax(2).view(logits.shape))


def test_random_weights_of_slots() -> None:
    """Random sizes, kinds of data, masks and scales against the definition, on each instruction set's default."""
    spec = ops()["slot_weights"]
    for seed in range(150):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: float) -> float:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        shape = [int(pick(1, 2, 5)), int(pick(1, 2, 15, 16, 17, 64, 97)), int(pick(1, 3, 7, 8, 9, 16, 31, 33, 130))]
        logits = torch.randn(shape, generator=g) * pick(1e-12, 0.1, 1, 1, 30, 300, 1e30)
        scaled = bool(pick(0, 1))  # the product is rounded to float32: around a large mean little else would be left
        logits = logits if scaled else logits + pick(0, 0, 1e3, -1e5)
        if pick(0, 0, 1):
            logits[torch.rand(shape, generator=g) < pick(0.01, 0.5, 0.99)] = pick(torch.nan, -torch.inf, torch.inf)
        scale = torch.randn(shape[:2], generator=g) if scaled else torch.empty(0)
        mask = torch.rand(shape[:2], generator=g) < pick(0.2, 0.9) if pick(0, 1) else torch.empty(0, dtype=torch.bool)
        weighting = ("softmax", "linear")[int(pick(0, 1))]
        args = (logits, scale, mask, weighting, bool(pick(0, 1)) and scaled)
        # A logit is as good as float32 holds it: with a large product, e^L is as good as L
        loose = 1e-5 + 2e-7 * float(logits.nan_to_num(0, 0, 0).abs().amax().clamp_max(3e3)) * (3 if scaled else 0)
        for got, want in zip(spec.op(*args), spec.reference(*args), strict=True):
            print(f"seed {seed}: {shape}")  # shown by pytest where the comparison fails
            torch.testing.assert_close(got, want, atol=loose, rtol=loose, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: weigh_slots(x[0]), ValueError, r"slot_weights: logits must be \[B, N, S\], got \[4, 6\]"),
        (lambda x: weigh_slots(x.double()), TypeError, "slot_weights: logits must be float32.* got torch.float64"),
        (lambda x: weigh_slots(x, weighting="phi"), ValueError, "weighting must be one of softmax, linear, got 'phi'"),
        (lambda x: weigh_slots(x, scale=x[0]), ValueError, r"scale must be \[2, 4\], \[B, N\] of logits, got \[4, 6\]"),
        (lambda x: weigh_slots(x, mask=x[..., 0]), TypeError, "mask must be torch.bool, got torch.float32"),
        (lambda x: weigh_slots(x, scale_dispatch=True), ValueError, "scale_dispatch needs scale, got None"),
        (lambda x: SoftMoE(6, 2, 2, form="unit"), ValueError, "SoftMoE: form must be one of l2, rms, layer, plain"),
        (lambda x: SoftMoE(8, 2, 2)(x), ValueError, r"SoftMoE: x must be \[B, N, 8\], got \[2, 4, 6\]"),
        (lambda x: SoftMoE.from_vmoe({"mu": x}), ValueError, "a vmoe block must hold one Dense_0/kernel, got mu"),
        (lambda x: SoftMoE.from_soft_moe_pytorch({"a": x}), ValueError, "must hold slot_embeds, got a"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 4, 6))  # type: ignore[operator]
