"""From features to maps and picture scores, on made-up features; progress and memory rules of the loop."""

import pytest
import torch

from planmill.inspection.backbones import Backbone
from planmill.inspection.features import finite_pictures
from planmill.inspection.pipeline import Stopwatch
from planmill.inspection.plans import plan_batch
from planmill.inspection.scoring import interpolate_maps, score_patches, score_pictures
from planmill.kernels.neighbors.mutual_score import score_mutually
from planmill.kernels.neighbors.neighborhood_pooling import pool_neighborhood


def quiet(stage: str, done: int, total: int) -> None:
    """No progress bar."""


@pytest.mark.parametrize("radius", [None, 1.0])
def test_the_mean_over_layers_and_widths(generator: torch.Generator, radius: float | None) -> None:
    features = [torch.randn(5, 12, 8, generator=generator) for _ in range(2)]
    wanted = torch.zeros(5, 12, dtype=torch.float64)
    for layer in features:
        for degree in (1, 3):
            pooled = pool_neighborhood(layer, (3, 4), degree)
            wanted += score_mutually(pooled, radius=radius, grid=(3, 4)).double() / 4
    kept = list(features)
    got = score_patches(kept, (3, 4), (1, 3), radius, torch.float32, quiet)
    assert kept == []  # each layer is dropped once it is done
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_bfloat16_scores_are_close(generator: torch.Generator) -> None:
    features = torch.randn(5, 16, 32, generator=generator)
    exact, rounded = (
        score_patches([features], (4, 4), (1,), None, dtype, quiet) for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(exact, rounded, rtol=0, atol=5e-3)


def test_corner_patches_lie_on_corner_pixels() -> None:
    patches = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    full = interpolate_maps(patches, (5, 9))
    assert full.shape == (1, 5, 9)
    assert [full[0, 0, 0], full[0, 0, -1], full[0, -1, 0], full[0, -1, -1]] == [0, 1, 2, 3]
    assert full[0, 2, 4] == 1.5


def test_picture_scores_lie_between_0_and_1_and_smooth_over_like_pictures() -> None:
    maps = torch.zeros(4, 2, 2, dtype=torch.float64)
    maps[3, 0, 0] = 2.0
    raw, alone = score_pictures(maps, torch.eye(4) * 7, (8, 8), (1,))
    assert raw.tolist() == [0, 0, 0, 2]
    assert alone.tolist() == [0, 0, 0, 1]
    alike = 5 * (torch.ones(4, 4) + 0.05 * torch.eye(4))  # each picture is nearest to itself
    _, smoothed = score_pictures(maps, alike, (8, 8), (1, 4))
    torch.testing.assert_close(smoothed, torch.tensor([0.125, 0.125, 0.125, 0.625]), rtol=0, atol=1e-3)


def test_pictures_without_finite_features_are_found() -> None:
    layer, descriptors = torch.zeros(4, 2, 2), torch.zeros(4, 3)
    layer[1, 0, 0], descriptors[3, 2] = torch.nan, torch.inf
    assert finite_pictures([torch.zeros(4, 2, 2), layer], descriptors).tolist() == [True, False, True, False]


def test_few_batch_sizes_need_few_plans() -> None:
    assert [plan_batch(n) for n in (1, 8, 9, 32, 33, 64)] == [8, 8, 32, 32, 64, 64]


def test_the_stopwatch_adds_up_by_stage() -> None:
    watch = Stopwatch()
    for stage in ("b", "a", "b"):
        with watch.time(stage):
            pass
    assert list(watch.seconds) == ["b", "a"]
    assert min(watch.seconds.values()) > 0


def test_normalisation_is_per_channel() -> None:
    backbone = Backbone(
        torch.nn.Identity(), "x", "x", "x", None, (1, 1), (1, 1), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0)
    )
    got = backbone.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, 0.0]))
