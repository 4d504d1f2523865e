"""Roots of covariances, whitening and covariance pooling: float64 restatements, closed forms, drift, messages."""

import pytest
import scipy.linalg
import torch
from torch.nn import functional as F

from planmill.kernels import cpu_capabilities, cpu_capability, ops
from planmill.kernels.moments import CovariancePooling, InstanceWhitening, matrix_sqrt, pool_covariance, whiten
from planmill.kernels.moments.matrix_root.cases import spd


def published(s: torch.Tensor, iterations: int) -> torch.Tensor:
    """Fast-MPN-COV's steps in float64: the first and the last are special, nothing is made symmetric."""
    a = s.double()
    trace = a.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    a = a / trace
    three = 3.0 * torch.eye(s.shape[1], dtype=torch.float64)
    z = 0.5 * (three - a)
    y = a @ z
    for _ in range(iterations - 2):
        half = 0.5 * (three - z @ y)
        y, z = y @ half, half @ z
    return 0.5 * (y @ (three - z @ y)) * trace.sqrt()


def largest_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """As a share of the largest entry."""
    return float((got.double() - want.double()).abs().max() / want.abs().max())


@pytest.mark.parametrize("spread", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("iterations", [3, 5, 12])
def test_equals_the_published_steps(generator: torch.Generator, iterations: int, spread: float) -> None:
    """Spectra of condition up to 1e8: symmetric products do not drift away from the general ones."""
    s = spd(generator, torch.float32, 3, 64, spread=spread)
    assert largest_error(matrix_sqrt(s, iterations=iterations), published(s, iterations)) < 1e-5


@pytest.mark.parametrize("inverse", [False, True])
def test_a_converged_iteration_stays(generator: torch.Generator, inverse: bool) -> None:
    """Half products of Y and Z would leave the root after some twenty steps, and reach infinity after thirty."""
    mix = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    s = (mix @ spd(generator, torch.float64, 1, 64, spread=1.0) @ mix.mT).float()
    values, vectors = torch.linalg.eigh(s.double())
    exact = vectors * values[:, None] ** (-0.5 if inverse else 0.5) @ vectors.mT
    for level in cpu_capabilities():
        with cpu_capability(level):
            assert largest_error(matrix_sqrt(s, iterations=60, inverse=inverse), exact) < 2e-5


def test_what_five_iterations_leave(generator: torch.Generator) -> None:
    """The published iteration has not converged after 5 steps, which is part of the models; 25 reach scipy (BSD-3)."""
    s = spd(generator, torch.float32, 1, 64)
    exact = torch.from_numpy(scipy.linalg.sqrtm(s[0].double().numpy()))
    assert 0.01 < float((matrix_sqrt(s[0]) - exact).norm() / exact.norm()) < 0.5
    assert largest_error(matrix_sqrt(s[0], iterations=25), exact) < 1e-5
    assert largest_error(matrix_sqrt(s[0], mode="exact"), exact) < 1e-6
    inverse = torch.linalg.inv(exact)
    assert largest_error(matrix_sqrt(s[0], iterations=25, inverse=True), inverse) < 1e-5
    assert largest_error(matrix_sqrt(s[0], mode="exact", inverse=True), inverse) < 1e-6


def test_exact_of_singular_and_unknown_matrices(generator: torch.Generator) -> None:
    s = spd(generator, torch.float32, 4, 12, rows=5).double().float()
    s[1], s[2, 3, 3], s[3] = 0.0, torch.nan, -s[3]
    root, inverse = matrix_sqrt(s, mode="exact"), matrix_sqrt(s.double().float(), mode="exact", inverse=True)
    assert largest_error(root[0] @ root[0], s[0]) < 1e-6
    assert not root[1].any()
    assert not inverse[1].any()
    assert bool(root[2:].isnan().all())
    assert bool(inverse[2:].isnan().all())


def test_matrices_of_a_batch_do_not_depend_on_each_other(generator: torch.Generator) -> None:
    """Bit for bit, whether a matrix is shared among threads or has one to itself."""
    s = spd(generator, torch.float32, 5, 70)
    together = matrix_sqrt(s, inverse=True)
    for b in range(5):
        assert torch.equal(matrix_sqrt(s[b], inverse=True), together[b])
    s[0], s[2] = torch.nan, torch.inf
    again = matrix_sqrt(s, inverse=True)
    for b in (1, 3, 4):
        assert torch.equal(again[b], together[b])


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_random_matrices() -> None:
    """Random sizes, spectra, ranks, factors and lengths on every instruction set."""
    spec = ops()["matrix_root"]
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: float) -> float:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        batch, d = int(pick(1, 2, 5)), int(pick(1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 65, 100))
        dtype = (torch.float32, torch.bfloat16, torch.float16)[int(pick(0, 0, 1, 2))]
        factor = pick(1, 1, 1e-6, 1e3) if dtype is torch.float16 else pick(1, 1, 1e-12, 1e-30, 1e30)
        s = spd(g, torch.float32, batch, d, rows=int(pick(0, 0, 1, 3, 50)), spread=pick(0, 1, 3)) * factor
        args = (s.to(dtype), int(pick(1, 2, 3, 5, 7)), bool(pick(0, 1)))
        for level in cpu_capabilities():
            with cpu_capability(level):
                got = spec.op(*args)
            assert spec.compare is not None
            print(f"seed {seed}: {list(s.shape)} {args[1:]} {level}")  # shown by pytest where the comparison fails
            spec.compare(args, (got,), (spec.reference(*args),), 0.0, 1e-5)


@pytest.mark.parametrize("mode", ["newton", "exact"])
def test_whitening(generator: torch.Generator, mode: str) -> None:
    """Converged, the covariance is the identity; the mean may be far from zero; each image is on its own."""
    mix = torch.randn(24, 24, generator=generator)
    x = torch.einsum("cd,bdhw->bchw", mix, torch.randn(3, 24, 9, 11, generator=generator)) + 500
    y = whiten(x, iterations=30, mode=mode).flatten(2).double()
    assert float(y.mean(2).abs().max()) < 1e-3
    covariance = y @ y.mT / 99
    assert float((covariance - torch.eye(24)).abs().max()) < 2e-2
    z = x.flatten(2).double()
    z = z - z.mean(2, keepdim=True)
    s = z @ z.mT / 99 + 1e-5 * torch.eye(24)
    values, vectors = torch.linalg.eigh(s)
    exact = vectors * values.rsqrt()[:, None] @ vectors.mT @ z
    assert float((y - exact).abs().max()) < 1e-2
    together = whiten(x, mode=mode)
    torch.testing.assert_close(whiten(x[1:2], mode=mode), together[1:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whiten(x.flatten(2), mode=mode), together.flatten(2), atol=1e-5, rtol=1e-5)
    x[0] = torch.nan
    assert bool(whiten(x, mode=mode)[0].isnan().all())
    torch.testing.assert_close(whiten(x, mode=mode)[1:], together[1:], atol=1e-5, rtol=1e-5)


def test_five_steps_of_whitening_are_those_of_iterative_normalisation(generator: torch.Generator) -> None:
    """Q <- 1.5 Q - 0.5 Q^3 A from Q = I, in float64."""
    x = torch.randn(2, 20, 60, generator=generator) * torch.logspace(0, -2, 20)[:, None]
    z = x.double() - x.double().mean(2, keepdim=True)
    s = z @ z.mT / 60 + 1e-5 * torch.eye(20)
    trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    q = torch.eye(20, dtype=torch.float64).expand(2, 20, 20)
    for _ in range(5):
        q = 1.5 * q - 0.5 * q @ q @ q @ (s / trace)
    torch.testing.assert_close(whiten(x).double(), q / trace.sqrt() @ z, atol=1e-5, rtol=1e-5)


def test_constant_maps_and_poisoned_images(generator: torch.Generator) -> None:
    x = torch.randn(3, 6, 4, 5, generator=generator)
    x[0] = 3.0
    x[1, 2, 1, 1] = torch.nan
    for result in (whiten(x), pool_covariance(x)):
        assert not result[0].any()
        assert bool(result[1].isnan().all())
        assert bool(result[2].isfinite().all())
    assert whiten(x[:, :, :0]).shape == (3, 6, 0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(generator: torch.Generator, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 16, 50, generator=generator) + 3).to(dtype)
    torch.testing.assert_close(whiten(x), whiten(x.float()).to(dtype), atol=0, rtol=0)
    assert torch.equal(pool_covariance(x), pool_covariance(x.float()))


def test_pooling_is_the_head_of_the_paper(generator: torch.Generator) -> None:
    x = torch.randn(3, 10, 5, 6, generator=generator).relu()
    z = x.flatten(2).double()
    covariance = z @ (torch.eye(30, dtype=torch.float64) / 30 - torch.full((30, 30), 1 / 900)) @ z.mT
    root = published(covariance, 5)
    want = torch.stack([root[:, i, j] for i in range(10) for j in range(i, 10)], 1)
    torch.testing.assert_close(pool_covariance(x).double(), want, atol=1e-6, rtol=1e-5)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(pool_covariance(strided), pool_covariance(x))


def test_pooling_layer(generator: torch.Generator) -> None:
    """The published names: a state dict of `MPNCOV` loads as it is."""
    layer = CovariancePooling(12, 8)
    names = {f"conv_dr_block.{name}" for name in ("0.weight", *(f"1.{n}" for n in nn_names()))}
    assert set(layer.state_dict()) == names
    x = torch.randn(2, 12, 6, 7, generator=generator)
    layer(x)
    layer.eval()
    assert layer.conv_dr_block is not None
    assert torch.equal(layer(x), pool_covariance(layer.conv_dr_block(x)))
    assert CovariancePooling(12, None)(x).shape == (2, 78)


def nn_names() -> list[str]:
    return list(torch.nn.BatchNorm2d(1).state_dict())


def test_instance_whitening(generator: torch.Generator) -> None:
    layer = InstanceWhitening(12, groups=3, affine=True)
    assert layer.weight is not None
    assert layer.bias is not None
    layer.weight.data, layer.bias.data = (torch.randn(12, generator=generator) for _ in range(2))
    x = torch.randn(2, 12, 6, 7, generator=generator)
    want = torch.cat([whiten(part) for part in x.chunk(3, 1)], 1)
    want = want * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), want)
    x = torch.randn(2, 12, 40, generator=generator)
    one = InstanceWhitening(12, groups=12, iterations=20)(x)  # a group of one channel is instance normalisation
    torch.testing.assert_close(one, F.instance_norm(x, eps=1e-5), atol=1e-5, rtol=1e-4)


def test_gradient_compile_and_export(generator: torch.Generator) -> None:
    layer = InstanceWhitening(6, groups=2, affine=True)
    x = torch.randn(3, 6, 4, 5, generator=generator, requires_grad=True)
    w = torch.randn(3, 6, 4, 5, generator=generator)
    (layer(x) * w).sum().backward()
    z = x.detach().double().requires_grad_()
    c = z.view(6, 3, 20) - z.view(6, 3, 20).mean(2, keepdim=True)
    s = c @ c.mT / 20 + 1e-5 * torch.eye(3)
    trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    q = torch.eye(3, dtype=torch.float64).expand(6, 3, 3)
    for _ in range(5):
        q = 1.5 * q - 0.5 * q @ q @ q @ (s / trace)
    ((q / trace.sqrt() @ c).view_as(w) * w).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-4, rtol=1e-3)
    assert layer.weight is not None
    assert layer.weight.grad is not None
    x = x.detach()
    for model in (layer, CovariancePooling(6, None)):
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), model(x))
            shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
            program = torch.export.export(model, (x,), dynamic_shapes=shapes)
            more = torch.randn(5, 6, 4, 5, generator=generator)
            torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: matrix_sqrt(s[0, 0]), ValueError, r"matrix_root: s must be \[B, D, D\] or \[D, D\], got \[4\]"),
        (lambda s: matrix_sqrt(s[:, :3]), ValueError, r"got \[2, 3, 4\]"),
        (lambda s: matrix_sqrt(s.double()), TypeError, "matrix_root: s must be float32.* got torch.float64"),
        (lambda s: matrix_sqrt(s, mode="svd"), ValueError, "mode must be one of newton, exact, got 'svd'"),
        (lambda s: matrix_sqrt(s, iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda s: whiten(s[0]), ValueError, r"whiten: x must be \[B, C, H, W\] or \[B, C, HW\], got \[4, 4\]"),
        (lambda s: pool_covariance(s.int()), TypeError, "pool_covariance: x must be float32.* got torch.int32"),
        (lambda s: InstanceWhitening(5, groups=2), ValueError, "channels must be a multiple of groups, got 5 and 2"),
        (lambda s: InstanceWhitening(5)(s), ValueError, r"InstanceWhitening: x must have 5 channels, got \[2, 4, 4\]"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4, 4))  # type: ignore[operator]
