"""neighborhood_pooling and neighbor_rescoring against the published forms, and their messages."""

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.neighbors import pool_neighborhood, rescore_by_neighbors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published_pooling(f: torch.Tensor, grid: tuple[int, int], r: int) -> torch.Tensor:
    """LNAMD as published: LayerNorm, unfold of r x r windows, adaptive average of C*r*r numbers to C, unit rows."""
    n, _, c = f.shape
    image = F.layer_norm(f.double().transpose(1, 2).reshape(n, c, *grid), (c, *grid))
    windows = F.unfold(image, r, padding=r // 2).transpose(1, 2)  # [N, P, C * r * r]
    return F.normalize(F.adaptive_avg_pool1d(windows, c), dim=2)


@pytest.mark.parametrize("r", [1, 3, 5])
def test_equals_the_published_unfold(r: int) -> None:
    f = normal(3, 7 * 9, 20)
    torch.testing.assert_close(
        pool_neighborhood(f, (7, 9), r).double(), published_pooling(f, (7, 9), r), atol=1e-6, rtol=0
    )


def test_a_large_mean_loses_nothing() -> None:
    f = normal(2, 64, 32).double() * 1e-2 + 1e4
    want = published_pooling(f.float(), (8, 8), 3)
    torch.testing.assert_close(pool_neighborhood(f.float(), (8, 8), 3).double(), want, atol=1e-5, rtol=0)


def test_extreme_values_keep_unit_rows() -> None:
    for scale in (1e25, 1e-4):
        rows = pool_neighborhood(normal(1, 20, 16) * scale, (4, 5), 3)
        torch.testing.assert_close(rows.norm(dim=2), torch.ones(1, 20), atol=1e-5, rtol=0)


def test_an_image_does_not_touch_another() -> None:
    f = normal(3, 30, 16)
    alone = pool_neighborhood(f[1:2], (5, 6), 3)
    f[0] = torch.nan
    assert torch.equal(pool_neighborhood(f, (5, 6), 3)[1:2], alone)


def test_rescoring_equals_the_published_loop() -> None:
    s, e = normal(12).double(), F.normalize(normal(12, 8, seed=1).double().abs(), dim=1)
    scaled = (s - s.min()) / (s.max() - s.min())
    w = e @ e.T
    want = torch.zeros(12, dtype=torch.float64)
    for k in (1, 2, 3):
        for i in range(12):
            top = w[i].topk(k).indices
            want[i] += (w[i, top] * scaled[top]).sum() / w[i, top].sum() / 3
    got = rescore_by_neighbors(s.float(), e.float(), (1, 2, 3))
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f: pool_neighborhood(f, (2, 2)),
            ValueError,
            "neighborhood_pooling: grid must hold P = 6 patches, got 2 x 2",
        ),
        (lambda f: pool_neighborhood(f, (-2, -3)), ValueError, "grid must hold"),
        (lambda f: pool_neighborhood(f, (2, 3), 2), ValueError, "size must be odd and positive, got 2"),
        (lambda f: pool_neighborhood(f[0], (2, 3)), ValueError, r"features must be \[N, P, C\]"),
        (lambda f: pool_neighborhood(f.double(), (2, 3)), TypeError, "got torch.float64"),
        (lambda f: rescore_by_neighbors(f[0, 0], f[0]), ValueError, r"descriptors must be \[N, E\] with N = 4"),
        (lambda f: rescore_by_neighbors(f[0, :, 0], f[0], ()), ValueError, "sizes of at least 1"),
        (lambda f: rescore_by_neighbors(f[0, :, 0], f[0], (0, 1)), ValueError, "sizes of at least 1"),
        (lambda f: rescore_by_neighbors(f[0], f[0]), ValueError, r"scores must be \[N\]"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 6, 4))  # type: ignore[operator]
