"""expert_mixture: what its docstring promises, beside the cases that the registry's tests run."""

import itertools
from typing import Any

import pytest
import torch

from planmill import kernels
from planmill.kernels.routing import mix_experts
from planmill.kernels.routing.expert_mixture.cases import assignments, compare, mixture
from planmill.kernels.routing.expert_mixture.reference import expert_mixture_reference

from ..conftest import Check

LEVELS = kernels.cpu_capabilities() or ("reference",)
NATIVE = [level for level in ("baseline", "avx2", "avx512", "amx") if level in LEVELS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(args: tuple) -> torch.Tensor:
    x, indices, weights, up, up_bias, down, down_bias, activation, weight_on_input = args
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    given = {name: bias for name, bias in biases.items() if bias.numel()}
    return mix_experts(x, indices, weights, up, down, activation=activation, weight_on_input=weight_on_input, **given)


@pytest.mark.parametrize(
    ("level", "emulated"), [*((level, False) for level in NATIVE), ("amx", True)],
    ids=lambda v: v if isinstance(v, str) else "emulated" if v else "native",
)  # fmt: skip
def test_blocks_of_every_instruction_set(level: str, emulated: bool, check_kernels: Check) -> None:
    """AMX emulated holds what AVX-512 is made of too: vectors of 16, but for their intrinsics."""
    check_kernels(f"routing/expert_mixture_{level}", "-O1", emulated=emulated)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_every_batch(level: str, dtype: torch.dtype) -> None:
    """Alone, among few (streamed), among many (packed, several blocks of rows), on one thread or two."""
    x, indices, weights, *rest = mixture(dtype, generator(), 300, 2, 3, 300, 70, bias=True)
    with kernels.cpu_capability(level):
        whole = call((x, indices, weights, *rest))
        for first, last in ((0, 1), (7, 9), (20, 33), (100, 290)):
            part = call((x[first:last], indices[first:last], weights[first:last], *rest))
            torch.testing.assert_close(part, whole[first:last], rtol=0, atol=0)
        order = torch.randperm(300, generator=generator(1))
        torch.testing.assert_close(
            call((x[order], indices[order], weights[order], *rest)), whole[order], rtol=0, atol=0
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            torch.testing.assert_close(call((x, indices, weights, *rest)), whole, rtol=0, atol=0)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_token_touches_no_other(level: str, value: float) -> None:
    x, *rest = mixture(torch.float32, generator(), 40, 2, 3, 33, 50)
    with kernels.cpu_capability(level):
        clean = call((x, *rest))
        x[17, 30] = value
        got = call((x, *rest))
    assert bool(got[17].isnan().all())
    others = torch.arange(40) != 17
    torch.testing.assert_close(got[others], clean[others], rtol=0, atol=0)


def test_all_experts_with_softmax_weights_are_the_dense_mixture() -> None:
    x, _, _, up, _, down, *_ = mixture(torch.float32, generator(), 23, 4, 4, 32, 48)
    weights = torch.randn(23, 4, generator=generator(1)).softmax(1)
    indices = torch.arange(4, dtype=torch.int32).expand(23, 4)
    gate, rest = torch.einsum("td,efd->etf", x.double(), up.double()).chunk(2, 2)
    dense = torch.einsum("etf,eof->eto", torch.nn.functional.silu(gate) * rest, down.double())
    want = torch.einsum("eto,te->to", dense, weights.double())
    compare((), (mix_experts(x, indices, weights, up, down),), (want.float(),), 2e-6, 0)


def test_order_of_assignments_and_repeated_experts() -> None:
    x, indices, weights, up, _, down, *_ = mixture(torch.float32, generator(), 9, 1, 4, 16, 24)
    single = mix_experts(x, indices, weights, up, down)
    twice = mix_experts(x, indices.expand(9, 2), torch.cat([weights, 2 * weights], 1), up, down)
    torch.testing.assert_close(twice, 3 * single)
    dropped = torch.cat([torch.full_like(indices, -1), indices], 1)
    torch.testing.assert_close(mix_experts(x, dropped, weights.expand(9, 2), up, down), single, rtol=0, atol=0)
    assert not bool(mix_experts(x, torch.full_like(indices, -1), weights, up, down).any())


def test_hidden_rows_beyond_float16_do_not_overflow() -> None:
    x, indices, weights, up, _, down, *_ = mixture(torch.float16, generator(), 7, 2, 3, 16, 24)
    args = (x * 600, indices, weights, up, torch.empty(0).half(), down / 64, torch.empty(0).half(), "silu", False)
    assert bool(call(args).isfinite().all())
    compare(args, (call(args),), (expert_mixture_reference(*args),), 2e-3, 2e-3)


def test_weights_are_read_where_they_lie() -> None:
    """Views with dense rows: experts of a larger bank, every second row, a slice of wider rows; and transposed ones."""
    x, indices, weights, up, _, down, *_ = mixture(torch.float32, generator(), 12, 2, 3, 16, 24)
    want = mix_experts(x, indices, weights, up, down)
    wide = torch.full((2 * 3, 2 * 48, 16 + 5), torch.nan)
    wide[::2, ::2, 2:18] = up
    torch.testing.assert_close(mix_experts(x, indices, weights, wide[::2, ::2, 2:18], down), want, rtol=0, atol=0)
    turned = up.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(mix_experts(x, indices, weights, turned, down), want, rtol=0, atol=0)


def test_offsets_beyond_32_bits() -> None:
    """The last expert of 2^21 + 2, behind a stride of zero: the product of expert and size is beyond 2^34."""
    experts, f, d = 2**21 + 2, 64, 128
    x, _, weights, up, _, down, *_ = mixture(torch.float32, generator(), 3, 1, 1, d, f, gated=False)
    indices = torch.full((3, 1), experts - 1, dtype=torch.int32)
    got = mix_experts(x, indices, weights, up.expand(experts, f, d), down.expand(experts, d, f))
    torch.testing.assert_close(got, mix_experts(x, torch.zeros_like(indices), weights, up, down), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [2**31 // 64, 2**32 // 64 + 1])
def test_a_row_beyond_32_bits(offset: int) -> None:
    """A bank whose last expert starts beyond 2^31 numbers, in memory that is reserved and never touched before it."""
    d = f = 64
    bank = torch.empty(offset + f, d, dtype=torch.float16)  # the pages before the last are never written
    bank[-f:] = torch.randn(f, d, generator=generator()).half()
    up = bank.as_strided((2, f, d), (offset * d, d, 1))
    x, down = torch.randn(2, d, generator=generator(1)).half(), torch.randn(2, d, f, generator=generator(2)).half()
    weights, last = torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int32)
    got = mix_experts(x, last, weights, up, down, activation="relu")
    want = mix_experts(x, torch.zeros_like(last), weights, bank[-f:][None], down[1:], activation="relu")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradient_without_biases_and_with_dropped_rows() -> None:
    x, indices, weights, up, up_bias, down, down_bias, *rest = mixture(torch.float32, generator(), 11, 2, 4, 12, 10)
    indices[3] = -1
    mine = [t.clone().requires_grad_() for t in (x, weights, up, down)]
    theirs = [t.double().requires_grad_() for t in (x, weights, up, down)]
    mix_experts(mine[0], indices, mine[1], mine[2], mine[3]).square().sum().backward()
    a, w, u, d = theirs
    expert_mixture_reference(a, indices, w, u, up_bias, d, down_bias, *rest).square().sum().backward()
    for got, want in zip(mine, theirs, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-5)


def bad_arguments() -> list[Any]:
    def wrong(message: str, kind: type[Exception] = ValueError, **changed: Any) -> Any:
        return pytest.param(changed, kind, message, id=message.replace(" ", "_"))

    return [
        wrong("x must be [T, D]", x=torch.zeros(5)),
        wrong("indices must be [T, k]", indices=torch.zeros(5, dtype=torch.int32)),
        wrong("up must be [E, F or 2F, D]", up=torch.zeros(6, 8)),
        wrong("down must be [E, D_out, F]", down=torch.zeros(8, 3)),
        wrong("x must be float32, bfloat16 or float16", TypeError, x=torch.zeros(5, 8).double()),
        wrong("up must be torch.float32 like x", TypeError, up=torch.zeros(3, 6, 8).half()),
        wrong("down must be torch.float32 like x", TypeError, down=torch.zeros(3, 8, 3).half()),
        wrong("indices must be torch.int32", TypeError, indices=torch.zeros(5, 2).long()),
        wrong("weights must be torch.float32", TypeError, weights=torch.zeros(5, 2).half()),
        wrong("indices must be [5, 2]", indices=torch.zeros(4, 2, dtype=torch.int32)),
        wrong("weights must be [5, 2]", weights=torch.zeros(5, 3)),
        wrong("with F = 3 as in down", up=torch.zeros(3, 9, 8)),
        wrong("with the E of down and the D of x", up=torch.zeros(3, 6, 7)),
        wrong("activation must be one of", activation="tanh"),
        wrong("up_bias must be [3, 6]", up_bias=torch.zeros(3, 3)),
        wrong("down_bias must be [3, 8]", down_bias=torch.zeros(8)),
        wrong("up_bias must be torch.float32 like x", TypeError, up_bias=torch.zeros(3, 6).half()),
        wrong("indices must be -1 or below E = 3", indices=torch.full((5, 2), 3, dtype=torch.int32)),
        wrong("indices must be -1 or below", indices=torch.full((5, 2), -2, dtype=torch.int32)),
        wrong("weights must be on cpu like x", weights=torch.zeros(5, 2, device="meta")),
        wrong("up must be on cpu like x", up=torch.zeros(3, 6, 8, device="meta")),
    ]


@pytest.mark.parametrize(("changed", "kind", "message"), bad_arguments())
def test_mistakes_are_named(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    args: dict[str, Any] = {
        "x": torch.zeros(5, 8), "indices": torch.zeros(5, 2, dtype=torch.int32), "weights": torch.zeros(5, 2),
        "up": torch.zeros(3, 6, 8), "down": torch.zeros(3, 8, 3),
    }  # fmt: skip
    with pytest.raises(kind) as caught:
        mix_experts(**{**args, **changed})
    assert str(caught.value).startswith("expert_mixture: ")
    assert message in str(caught.value)


def test_the_reference_names_a_wrong_index_too() -> None:
    x, indices, *rest = mixture(torch.float32, generator(), 3, 1, 2, 4, 4)
    with pytest.raises(ValueError, match="expert_mixture: indices must be -1 or below E = 2"):
        expert_mixture_reference(x, indices + 2, *rest)


def random_arguments(seed: int, dtype: torch.dtype) -> tuple:
    g = generator(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    tokens, experts = pick(1, 2, 5, 17, 60, 230), pick(1, 2, 3, 8, 40)
    k = pick(1, 2, min(4, experts))
    d, f, d_out = (pick(1, 3, 7, 8, 16, 17, 33, 64, 129, 257, 520) for _ in range(3))
    options = {"gated": pick(True, False), "bias": pick(True, False), "weight_on_input": pick(True, False, False)}
    activation = pick("silu", "gelu", "gelu_tanh", "relu")
    x, _, _, *rest = mixture(dtype, g, tokens, 1, experts, d, f, d_out=d_out, activation=activation, **options)
    indices, weights = assignments(g, tokens, min(k, experts), experts)
    if pick(True, False):
        indices = torch.randint(-1, experts, indices.shape, generator=g, dtype=torch.int32)
    kind = pick("normal", "normal", "mean", "mixed", "nan", "inf", "weights", "skewed")
    if kind == "mean":
        x = x + 10
    elif kind == "mixed":
        x = x * (10 ** torch.randn(tokens, 1, generator=g)).to(dtype)
    elif kind in ("nan", "inf"):
        x[int(torch.randint(tokens, (1,), generator=g)), pick(0, d - 1)] = float(kind)
    elif kind == "weights":
        weights = weights * 10 ** (2 * torch.randn(weights.shape, generator=g))
    elif kind == "skewed":
        indices = torch.where(torch.rand(indices.shape, generator=g) < 0.9, 0, indices).int()
    return x, indices, weights, *rest


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_arguments(dtype: torch.dtype) -> None:
    """What nobody thought of as a case. Sums may cancel: the bound is that of their terms."""
    levels = itertools.cycle(LEVELS)
    for seed in range(24):
        args = random_arguments(seed, dtype)
        check_random(args, dtype, next(levels), seed)


def check_random(args: tuple, dtype: torch.dtype, level: str, seed: int) -> None:
    with kernels.cpu_capability(level):
        got = call(args)
    wide: list[Any] = [t.double() if t.is_floating_point() else t for t in args[:-2]]
    want = expert_mixture_reference(*wide, *args[-2:])  # not rounded to dtype
    print(f"seed {seed}, {level}: {args[-2:]}, {[tuple(t.shape) for t in args[:-2]]}")  # shown where it fails
    assert torch.equal(got.isnan(), want.isnan())
    # the same sums over sizes, without any cancelling: act(z) is at most |z|, its slope at most 1.13
    sizes: list[Any] = [*(t.abs() if t.is_floating_point() else t for t in wide), "relu", args[-1]]
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * want.abs()
    inside = 2**-8 if level == "amx" and dtype == torch.bfloat16 else 1e-6  # tiles take the hidden rows as bfloat16
    bound = inside * expert_mixture_reference(*sizes) + rounding + torch.finfo(dtype).tiny
    excess = ((got.double() - want).abs() - bound).where(bound.isfinite() & want.to(dtype).isfinite(), 0)
    assert not bool((excess > 0).any())
