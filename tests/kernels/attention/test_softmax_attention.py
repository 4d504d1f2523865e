"""attend_by_softmax against PyTorch in float64, random draws, samples alone and in a batch, and messages."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.attention import attend_by_softmax

from ..conftest import Check


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_random_shapes(level: str) -> None:
    """Oracle: torch's attention in float64 (BSD-3-Clause)."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(30):
        batch, heads, d, dv = draw(1, 4), draw(1, 5), draw(1, 70), draw(1, 70)
        queries, keys = (draw(1, (10, 60, 280, 530)[draw(0, 4)]) for _ in range(2))
        sizes = ((queries, d), (keys, d), (keys, dv))
        q, k, v = (torch.randn(batch, heads, *size, generator=generator) for size in sizes)
        order = torch.randperm(4, generator=generator).tolist()
        back = torch.tensor(order).argsort().tolist()
        q, k, v = (x.permute(order).contiguous().permute(back) for x in (q, k, v))
        scale = (None, 0.02, 3.0, -0.5)[draw(0, 4)]
        with kernels.cpu_capability(level):
            got = attend_by_softmax(q, k, v, scale=scale)
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale).transpose(1, 2)
        assert got.shape == want.shape
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, atol=2e-5 * max(1, abs(scale or 1)), rtol=0)


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
@pytest.mark.usefixtures("two_threads")
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(level: str) -> None:
    q, k, v = normal(5, 3, 300, 24), normal(5, 3, 290, 24, seed=1), normal(5, 3, 290, 20, seed=2)
    with kernels.cpu_capability(level):
        together = attend_by_softmax(q, k, v)
        assert torch.equal(attend_by_softmax(q[3:4], k[3:4], v[3:4]), together[3:4])
        for first, rows in ((0, 1), (5, 7), (12, 13), (40, 250)):
            alone = attend_by_softmax(q[:, :1, first : first + rows], k[:, :1], v[:, :1])
            assert torch.equal(alone, together[:, first : first + rows, :1]), rows


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: attend_by_softmax(q[0], k, v), ValueError, r"q must be \[B, H, N, D\], got \[2, 4, 5\]"),
        (lambda q, k, v: attend_by_softmax(q, k[:, :1], v), ValueError, r"k must be \[3, 2, M, 5\] for q"),
        (lambda q, k, v: attend_by_softmax(q, k[..., :4], v), ValueError, r"k must be \[3, 2, M, 5\] for q"),
        (lambda q, k, v: attend_by_softmax(q, k, v[:, :, :3]), ValueError, r"v must be \[3, 2, 7, Dv\] like k"),
        (
            lambda q, k, v: attend_by_softmax(q[..., :0], k[..., :0], v),
            ValueError,
            "scale must be given where q has no",
        ),
        (lambda q, k, v: attend_by_softmax(q, k.double(), v), TypeError, "k must be float32, got torch.float64"),
        (lambda q, k, v: attend_by_softmax(q.half(), k, v), TypeError, "q must be float32, got torch.float16"),
        (lambda q, k, v: attend_by_softmax(q, k, v.to("meta")), ValueError, "v must be on cpu like q, got meta"),
    ],
)
def test_messages(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(3, 2, 4, 5), normal(3, 2, 7, 5), normal(3, 2, 7, 6))


def test_avx512_over_emulated_registers(check_kernels: Check) -> None:
    check_kernels("attention/softmax_attention_avx512", "-O0", "-fsanitize=address", emulated=True)
