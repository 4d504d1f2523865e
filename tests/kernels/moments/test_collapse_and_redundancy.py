"""measure_collapse and measure_redundancy: their definitions in float64, the simplex, gradients, errors."""

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.moments import measure_collapse, measure_redundancy, simplex_vectors
from planmill.kernels.moments.cross_correlation.reference import cross_correlation_reference
from planmill.kernels.moments.neural_collapse.reference import neural_collapse_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_collapse_is_its_definition(dtype: torch.dtype) -> None:
    """More channels than classes and fewer, one row of a class, an offset, rows without a label."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        classes, d, n = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 9), (3, 40), (40, 300)))
        labels = torch.cat([torch.arange(classes), torch.randint(-1, classes, (n,), generator=g)])
        means = torch.randn(classes, d, generator=g) * 3 + 20
        x = (torch.randn(len(labels), d, generator=g) + means[labels]).to(dtype)
        weight, bias = torch.randn(classes, d, generator=g), torch.randn(classes, generator=g)
        weight = weight - weight.mean(0)
        kept = labels >= 0
        want = neural_collapse_reference(x[kept], labels[kept], weight, bias)
        found = measure_collapse(x, labels, weight, bias)
        for name, got, wanted in zip(found._fields, found, want, strict=True):
            assert abs(got - wanted) <= 2e-4 * abs(wanted) + 1e-5, f"seed {seed}: {name} is {got}, not {wanted}"


def test_a_simplex_has_collapsed(generator: torch.Generator) -> None:
    vertices = simplex_vectors(6)
    labels = torch.arange(60) % 6
    found = measure_collapse(5 * vertices[labels] + 3, labels, vertices, -3 * vertices.sum(1))
    assert max(found[:5]) < 1e-5
    assert found.agreement == 1.0
    noise = torch.randn(60, 5, generator=generator)
    spread = measure_collapse(5 * vertices[labels] + noise, labels, -vertices)
    assert spread.variability > 0.01
    assert spread.duality == pytest.approx(2.0, abs=0.2)
    assert spread.agreement < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (17, 5), (9, 33), (64, 64), (3, 200)], ids=str)
def test_redundancy_is_its_definition(generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype) -> None:
    first = torch.randn(*shape, generator=generator) * 3 + 50
    second = first + torch.randn(*shape, generator=generator)
    first, second = first.to(dtype), second.to(dtype)
    _, on, off = cross_correlation_reference(first, second, 1e-5)
    found = measure_redundancy(first.T.contiguous().T, second)
    torch.testing.assert_close(found.invariance, on, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.redundancy, off, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss(), on + 0.0051 * off, atol=1e-5, rtol=1e-5)


def test_a_constant_channel_counts_as_zero(generator: torch.Generator) -> None:
    first, second = torch.randn(2, 40, 6, generator=generator)
    first[:, 2] = 7.0
    found, (correlation, on, _) = measure_redundancy(first, second), cross_correlation_reference(first, second, 1e-5)
    assert not bool(correlation[2].any())
    torch.testing.assert_close(found.invariance, on, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)], ids=str)
def test_gradient_of_redundancy(generator: torch.Generator, shape: tuple[int, int]) -> None:
    gradients = []
    for call in (measure_redundancy, lambda a, b: cross_correlation_reference(a, b, 1e-5)[1:]):
        g = torch.Generator().manual_seed(1)
        views = [torch.randn(*shape, generator=g).requires_grad_() for _ in range(2)]
        on, off = call(*views)
        gradients.append(torch.autograd.grad(on + 0.1 * off, views))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_redundancy_compiles_and_exports(generator: torch.Generator) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return measure_redundancy(F.relu(x), y).loss()

    module, (x, y) = Module(), torch.randn(2, 6, 9, generator=generator)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))
    rows = torch.export.Dim("rows", min=2, max=8)
    program = torch.export.export(module, (x, y), dynamic_shapes={"x": {0: rows}, "y": {0: rows}})
    torch.testing.assert_close(program.module()(x[:4], y[:4]), module(x[:4], y[:4]))


def test_errors() -> None:
    x, labels, weight = torch.randn(6, 4), torch.arange(6) % 3, torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"weight must be \[K, 4\] with K at least 2, got \[3, 3\]"):
        measure_collapse(x, labels, weight[:, :3])
    with pytest.raises(ValueError, match="class 2 has no rows"):
        measure_collapse(x, labels % 2, weight)
    with pytest.raises(ValueError, match=r"bias must be \[3\], got \[2\]"):
        measure_collapse(x, labels, weight, torch.zeros(2))
    with pytest.raises(ValueError, match="the mean of class 0 is the mean of all"):
        measure_collapse(torch.ones(6, 4), labels, weight)
    x[4, 1] = torch.nan
    with pytest.raises(ValueError, match="features hold NaN or infinity in row 4"):
        measure_collapse(x, labels, weight)
    with pytest.raises(TypeError, match="features must be"):
        measure_collapse(x.double(), labels, weight)
    with pytest.raises(ValueError, match=r"of one shape \[B, D\] with B at least 2, got \[1, 4\] and \[1, 4\]"):
        measure_redundancy(x[:1], x[:1])
    with pytest.raises(ValueError, match=r"eps must be above 0, got 0\.0"):
        measure_redundancy(x, x, eps=0.0)
    with pytest.raises(TypeError, match="second must be"):
        measure_redundancy(x, x.int())
