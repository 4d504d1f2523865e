"""SoftmaxFreeAttention against the published form, attend_softmax_free on random draws, and their messages."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels import ops
from planmill.kernels.attention import SoftmaxFreeAttention, attend_softmax_free
from planmill.kernels.attention.softmax_free_attention.cases import drawn
from planmill.kernels.attention.softmax_free_attention.op import compare

ROOT = Path(__file__).parents[3]
SPEC = ops()["softmax_free_attention"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 2)


def published(x: torch.Tensor, state: dict, heads: int, side: int, normalized: bool = False) -> torch.Tensor:
    """The published layer in float64, one sample and head after the other.

    Written from the formulas of fudan-zvg/SOFT (MIT): its class cannot be run without CUDA.
    """
    w = {name: t.detach().double() for name, t in state.items()}
    x = x.double()
    q, v = (F.linear(x, w[f"W_{n}.weight"], w[f"W_{n}.bias"]) for n in "qv")
    d = x.shape[2] // heads
    out = torch.empty_like(x)
    for b in range(len(x)):
        for h in range(heads):
            own = slice(h * d, h * d + d)
            Q, V = q[b, :, own] / d**0.25, v[b, :, own]
            conv = F.conv2d(
                Q.T.view(1, d, side, side),
                w["attn.Qlandmark_op.weight"],
                stride=w["attn.Qlandmark_op.weight"].shape[-1],
            )
            norm = w["attn.Qnorm_act.0.weight"], w["attn.Qnorm_act.0.bias"]
            L = F.gelu(F.layer_norm(conv.flatten(2)[0].T, (d,), *norm, 1e-5)).numpy()
            C, A = gaussian(Q.numpy(), L), gaussian(L, L)
            rho, eye = A.sum(1).max(), np.eye(len(A))
            D, P = np.ones(len(A)), A + 0.01 * eye
            alpha = 1.8 / rho**2
            if normalized:
                D, P, alpha = A.sum(1) ** -0.5, A, 2 / rho**2
                for _ in range(10):
                    if np.abs(eye - P @ (alpha * P)).sum(0).max() > 1.01:
                        alpha /= 2
            inverse = alpha * P
            for _ in range(20):
                inverse = 2 * inverse - inverse @ P @ inverse
            Y = C @ (D[:, None] * inverse * D @ (C.T @ V.numpy()))
            own_filter = w["attn.conv.weight"][h : h + 1].expand(d, -1, -1, -1)
            pos = F.conv2d(V.T.reshape(1, d, side, side), own_filter, padding=own_filter.shape[-1] // 2, groups=d)
            out[b, :, own] = torch.from_numpy(Y) + pos.flatten(2)[0].T
    return F.linear(out, w["ff.weight"], w["ff.bias"])


def layer_of(*sizes: int, seed: int = 0, **options: Any) -> SoftmaxFreeAttention:
    """Random weights, those of the norm too; queries wide enough for kernels between the identity and all ones."""
    layer = SoftmaxFreeAttention(*sizes, **options)
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + index) * max(parameter[0].numel(), 1) ** -0.5
    layer.attn.Qnorm_act[0].weight.data += 0.5
    return layer.eval()


@pytest.mark.parametrize("normalized", [False, True], ids=["base", "normalized"])
def test_equals_the_published_layer(normalized: bool) -> None:
    layer = layer_of(24, 3, 2, 3, normalize=normalized)
    x = normal(2, 64, 24, seed=9)
    want = published(x, layer.state_dict(), 3, 8, normalized)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), want, atol=1e-4, rtol=1e-4)
        again = SoftmaxFreeAttention.from_soft(layer.state_dict(), normalize=normalized)
        assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = layer_of(32, 2, 2, 3).to(dtype)
    x = normal(2, 64, 32).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), published(x, layer.state_dict(), 2, 8), atol=0.05, rtol=0.02)


def test_any_image_that_the_ratio_divides() -> None:
    layer = layer_of(16, 2, 4, 5)
    x = normal(1, 96, 16)
    with torch.no_grad():
        wide = layer(x, 8, 12)
        assert torch.equal(layer(x, W=12), wide)
        assert torch.equal(layer(x, H=8), wide)
        turned = layer_of(16, 2, 4, 5)
        for name in ("Qlandmark_op", "conv"):
            getattr(turned.attn, name).weight.data = getattr(layer.attn, name).weight.data.transpose(2, 3)
        tall = turned(x.view(1, 8, 12, 16).transpose(1, 2).reshape(1, 96, 16), 12, 8)
    back = tall.view(1, 12, 8, 16).transpose(1, 2).reshape(1, 96, 16)
    torch.testing.assert_close(back, wide, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", ["newton", "solve"])
def test_a_sample_alone_gives_the_same_bits(mode: str) -> None:
    q, v, landmarks, *rest = drawn(torch.float32, torch.Generator().manual_seed(3), 5, 2, 1300, 33, 16, mode=mode)
    together = SPEC.op(q, v, landmarks, *rest)
    alone = SPEC.op(q[3:4], v[3:4], landmarks[3:4], *rest)
    assert torch.equal(together[3:4], alone)
    head = SPEC.op(q[3:4, 1:], v[3:4, 1:], landmarks[3:4, 1:], *rest)
    assert torch.equal(together[3:4, 1:], head)
    torch.set_num_threads(1)
    assert torch.equal(SPEC.op(q, v, landmarks, *rest), together)


def test_samples_do_not_depend_on_each_other_unless_coupled() -> None:
    q, v, landmarks, *rest = drawn(
        torch.float32, torch.Generator().manual_seed(0), 2, 1, 30, 12, 8, normalize=True, ridge=0.0
    )
    other = landmarks.clone()
    other[1] *= 0.1  # a larger rho
    few = {"normalize": True, "iterations": 4, "scale": rest[0]}
    first, second = (attend_softmax_free(q, v, each, **few)[0] for each in (landmarks, other))
    assert torch.equal(first, second)
    first, second = (attend_softmax_free(q, v, each, **few, batch_coupled=True)[0] for each in (landmarks, other))
    assert (first - second).abs().max() > 1e-2 * first.abs().max()


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3, 1.0])
def test_newton_is_its_closed_form(spread: float) -> None:
    """In the eigenbasis of P: (1 - (1 - alpha p^2)^(2^20)) / p, whether or not it has converged."""
    q, v, landmarks, scale, *_ = drawn(torch.float32, torch.Generator().manual_seed(1), 1, 1, 60, 49, 8, spread=spread)
    Q, L = scale * q[0, 0].double().numpy(), landmarks[0, 0].double().numpy()
    C, A = gaussian(Q, L), gaussian(L, L)
    p, basis = np.linalg.eigh(A + 0.01 * np.eye(49))
    near = 1.8 / A.sum(1).max() ** 2 * p**2
    left = np.exp(2.0**19 * np.log1p(-near * (2 - near)))  # (1 - near)^2 to the 2^19: 1 - near may be negative
    want = C @ (basis * ((1 - left) / p)) @ (basis.T @ (C.T @ v[0, 0].double().numpy()))
    compare((), (attend_softmax_free(q, v, landmarks),), (torch.from_numpy(want)[None, None].float(),), 4e-4, 2e-4)
    if spread == 1.0:
        assert left.max() < 1e-6
        torch.testing.assert_close(
            attend_softmax_free(q, v, landmarks, mode="solve"),
            attend_softmax_free(q, v, landmarks),
            atol=1e-4,
            rtol=1e-3,
        )
    if spread == 0.0:
        assert left.max() > 0.9, "most of the inverse is not there after 20 steps"


def test_random() -> None:
    """Random sizes, spreads, dtypes and modes against the definition."""
    for seed in range(120):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: float) -> float:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        normalize, mode = bool(pick(0, 0, 1)), ("newton", "newton", "solve")[int(pick(0, 1, 2))]
        free = normalize and mode == "newton"  # without a ridge, float32 cannot tell far landmarks, or two near ones
        sizes = [
            int(pick(1, 2, 3)),
            int(pick(1, 2)),
            int(pick(1, 2, 47, 48, 49, 97, 289)),
            int(pick(8, 17, 33, 49, 64)),
        ]
        sizes += [int(pick(1, 3, 8, 16, 33)), int(pick(1, 3, 8, 17, 32))]
        sizes[3] = sizes[3] if free else int(pick(1, 2, 7, sizes[3]))
        args = drawn(
            torch.float32 if pick(0, 1) else torch.bfloat16, g, *sizes, mode=mode, normalize=normalize,
            batch_coupled=free and bool(pick(0, 1)), ridge=0.0 if free else pick(0.01, 0.05),
            iterations=int(pick(0, 1, 5, 20, 20)), spread=pick(0.0, 0.1, 0.3) if free else pick(0.0, 0.01, 0.3, 1, 3),
            scale=None if free else (None, 0.1, 3.0)[int(pick(0, 1, 2))],
        )  # fmt: skip
        print(f"seed {seed}: {sizes}, {args[3:]}")  # shown by pytest where the comparison fails
        compare(args, (SPEC.op(*args),), (SPEC.reference(*args),), *SPEC.tolerances[args[0].dtype])


def test_many_landmarks() -> None:
    """Past a block of every product of Newton's."""
    args = drawn(torch.float32, torch.Generator().manual_seed(2), 1, 1, 60, 301, 16, iterations=5)
    compare(args, (SPEC.op(*args),), (SPEC.reference(*args),), *SPEC.tolerances[torch.float32])


def test_no_data_race_in_cuda(tmp_path: Path) -> None:
    """Every thread of the block is a thread here: a missing barrier is a race that the sanitizer reports."""
    program = tmp_path / "check"
    source = Path(__file__).with_name("inverse_check.cpp")
    flags = ["-O1", "-std=c++20", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert "12 inverses checked" in result.stdout


def test_gradient_and_one_graph() -> None:
    """Finite differences of the published form, torch.compile(fullgraph=True), and export with a dynamic batch."""
    layer = layer_of(8, 2, 2, 3)
    x = normal(2, 16, 8).requires_grad_()
    weights = normal(2, 16, 8, seed=5).double()
    (layer(x) * weights).sum().backward()
    state, step = layer.state_dict(), 1e-5

    def slope(change: dict, move: torch.Tensor | float) -> float:
        ends = []
        for by in (step, -step):
            moved = {name: start + by * along for name, (start, along) in change.items()}
            ends.append((published(x.detach().double() + by * move, state | moved, 2, 4) * weights).sum())
        return float(ends[0] - ends[1]) / (2 * step)

    assert x.grad is not None
    move = normal(*x.shape, seed=6).double()
    assert float((x.grad * move).sum()) == pytest.approx(slope({}, move), rel=1e-3, abs=1e-4)
    for index, (name, parameter) in enumerate(layer.named_parameters()):
        assert parameter.grad is not None, name
        along = normal(*parameter.shape, seed=20 + index).double()
        got = float((parameter.grad * along).sum())
        assert got == pytest.approx(slope({name: (parameter.detach().double(), along)}, 0.0), rel=1e-3, abs=1e-4), name
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},))
        more = normal(5, 16, 8, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: attend_softmax_free(q[0], q, q), ValueError, r"q must be \[B, H, N, d\], got \[2, 4, 6\]"),
        (lambda q: attend_softmax_free(q.double(), q, q), TypeError, "q must be float32.* got torch.float64"),
        (lambda q: attend_softmax_free(q, q.half(), q), TypeError, "v must be torch.float32 like q, got torch.float16"),
        (lambda q: attend_softmax_free(q, q[:, :, 1:], q), ValueError, r"v must be \[1, 2, 4, 'dv'\] like q, got"),
        (lambda q: attend_softmax_free(q, q, q[:, :, :0]), ValueError, r"landmarks must be .* m at least 1, got"),
        (lambda q: attend_softmax_free(q[..., :0], q, q), ValueError, r"d at least 1, got \[1, 2, 4, 0\]"),
        (lambda q: attend_softmax_free(q, q, q, mode="svd"), ValueError, "one of newton, solve, got 'svd'"),
        (lambda q: attend_softmax_free(q, q, q, iterations=-1), ValueError, "iterations must be at least 0, got -1"),
        (lambda q: attend_softmax_free(q, q, q, ridge=-0.1), ValueError, "must be from 0 to 0.05 for .* got -0.1"),
        (lambda q: attend_softmax_free(q, q, q, mode="solve", ridge=0.0), ValueError, "above 0 to solve, got 0.0"),
        (lambda q: attend_softmax_free(q, q, q, batch_coupled=True), ValueError, "batch_coupled needs normalize=True"),
        (lambda q: SoftmaxFreeAttention(6, 4, 2), ValueError, "heads must divide dim, 6, got 4"),
        (lambda q: SoftmaxFreeAttention(6, 3, 0), ValueError, "ratio must be at least 1, got 0"),
        (lambda q: SoftmaxFreeAttention(6, 3, 2, 4), ValueError, "kernel_size must be odd, or 0 .* got 4"),
        (lambda q: SoftmaxFreeAttention(8, 2, 2)(q[0]), ValueError, r"x must be \[B, N, 8\], got \[2, 4, 6\]"),
        (lambda q: SoftmaxFreeAttention(6, 2, 2)(normal(1, 6, 6)), ValueError, "6 are no square, pass H and W"),
        (lambda q: SoftmaxFreeAttention(6, 2, 2)(q[0], 3), ValueError, "H \\* W must be .* 4, got H=3 and W=1"),
        (lambda q: SoftmaxFreeAttention(6, 2, 2)(q[0], -2, -2), ValueError, "H \\* W must be .* 4, got H=-2 and W=-2"),
        (lambda q: SoftmaxFreeAttention(6, 2, 2)(q[0], 4, 1), ValueError, "must divide H and W, got ratio=2, H=4"),
        (lambda q: SoftmaxFreeAttention.from_soft({"a": q}), ValueError, "must hold W_q.weight of 2 dimensions, got a"),
        (lambda q: SoftmaxFreeAttention.from_soft({**state_of(), "W_v.bias": q}), ValueError, "mismatch for W_v.bias"),
        (lambda q: SoftmaxFreeAttention.from_soft({**state_of(), "b": q}), ValueError, 'Unexpected key.* "b"'),
    ],
)  # fmt: skip
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(1, 2, 4, 6))  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(0, 16, 8), (2, 0, 8)], ids=["no_samples", "no_tokens"])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = SoftmaxFreeAttention(8, 2, 2)(x)
    y.sum().backward()
    assert y.shape == shape


def state_of() -> dict[str, torch.Tensor]:
    module: nn.Module = SoftmaxFreeAttention(6, 2, 2)
    return module.state_dict()
