"""mutual_score, bank_score and MutualScorer beyond the registry's tests: the published method, promises, messages."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.neighbors import MutualScorer, score_against_bank, score_mutually


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def published(z: torch.Tensor, high: float = 0.3) -> torch.Tensor:
    """MSM as its paper writes it, from cdist of one image against another, in float64."""
    n = len(z)
    scores = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        a = torch.stack([torch.cdist(z[i].double(), z[j].double()).min(1).values for j in others], 1)
        scores.append(a.sort(1).values[:, : int(high * (n - 1))].mean(1))
    return torch.stack(scores)


@pytest.mark.parametrize("shape", [(8, 50, 33), (11, 17, 130), (5, 200, 64)], ids=str)
def test_equals_the_published_formula(shape: tuple[int, int, int]) -> None:
    z = unit(*shape)
    torch.testing.assert_close(score_mutually(z).double(), published(z), atol=2e-6, rtol=0)


def test_half_precision_stays_within_its_promise() -> None:
    z = unit(6, 150, 256)
    for exact in (True, False):
        got = score_mutually(z.bfloat16(), exact=exact)
        torch.testing.assert_close(got.double(), published(z.bfloat16(), 0.3), atol=1e-6 if exact else 2e-3, rtol=0)


def test_duplicates_are_at_distance_zero_however_far_from_the_origin() -> None:
    z = unit(1, 60, 96) + 1e4
    z = torch.cat([z, z, z])
    assert torch.equal(score_mutually(z, high=0.9), torch.zeros(3, 60))


def test_an_outlier_image_is_found() -> None:
    z = unit(1, 40, 64).repeat(8, 1, 1) + 0.05 * unit(8, 40, 64, seed=1)
    z[3, 7] = unit(64, seed=2)
    scores = score_mutually(F.normalize(z, dim=-1))
    assert divmod(int(scores.argmax()), 40) == (3, 7)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_sets_give_numbers(n: int) -> None:
    scores = score_mutually(unit(n, 30, 16))
    assert bool(scores.isfinite().all())
    nearest = published(unit(n, 30, 16), high=1.0 / (n - 1))  # one image is kept
    torch.testing.assert_close(scores.double(), nearest, atol=1e-6, rtol=0)


def test_order_of_images_does_not_matter() -> None:
    z = unit(6, 50, 48)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(score_mutually(z[order]), score_mutually(z)[order], atol=1e-6, rtol=0)


def test_radius_that_covers_the_grid_is_no_radius() -> None:
    z = unit(4, 48, 40)
    near = score_mutually(z, radius=20, grid=(6, 8))
    torch.testing.assert_close(near, score_mutually(z), atol=1e-6, rtol=0)


def test_radius_forbids_a_far_match() -> None:
    z = unit(2, 25, 32)
    z[1, 24] = z[0, 0]
    assert score_mutually(z)[0, 0] == 0
    assert score_mutually(z, radius=2, grid=(5, 5))[0, 0] > 0.5


def test_bank_equals_the_formula_and_ignores_neighbours_in_the_batch() -> None:
    bank, new = unit(7, 40, 56), unit(3, 40, 56, seed=1)
    want = torch.stack(
        [
            torch.stack([torch.cdist(i.double(), b.double()).min(1).values for b in bank], 1)
            .sort(1)
            .values[:, :2]
            .mean(1)
            for i in new
        ]
    )
    together = score_against_bank(new, bank)
    torch.testing.assert_close(together.double(), want, atol=2e-6, rtol=0)
    assert torch.equal(together, torch.cat([score_against_bank(i[None], bank) for i in new]))


def test_scorer_extends_scores_saves_and_loads(tmp_path: Path) -> None:
    bank, new = unit(6, 48, 40), unit(2, 48, 40, seed=1)
    scorer = MutualScorer(high=0.5, radius=3, grid=(6, 8))
    scorer.extend(bank[:2]).extend(bank[2:])
    want = score_against_bank(new, bank, high=0.5, radius=3, grid=(6, 8))
    assert torch.equal(scorer.score(new), want)
    scorer.save(tmp_path / "bank.safetensors")
    loaded = MutualScorer.load(tmp_path / "bank.safetensors")
    assert torch.equal(loaded.score(new), want)
    other = MutualScorer(high=0.5, radius=3, grid=(6, 8))
    other.load_state_dict(scorer.state_dict())
    assert torch.equal(other.score(new), want)


def test_scorer_forward_is_score_mutually() -> None:
    z = unit(5, 20, 16)
    assert torch.equal(MutualScorer(high=0.6)(z), score_mutually(z, high=0.6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: score_mutually(z[:1]), ValueError, "at least 2 images, got 1.*MutualScorer.extend"),
        (lambda z: score_mutually(z[0]), ValueError, r"features must be \[N, P, C\], got \[9, 8\]"),
        (lambda z: score_mutually(z.double()), TypeError, "float32, bfloat16 or float16, got torch.float64"),
        (lambda z: score_mutually(z, low=-0.1), ValueError, "low must be >= 0"),
        (lambda z: score_mutually(z, high=0.0), ValueError, "high > 0"),
        (lambda z: score_mutually(z, radius=1), ValueError, r"radius needs grid=\(height, width\)"),
        (lambda z: score_mutually(z, radius=-2, grid=(3, 3)), ValueError, "radius must be >= 0 patches, got -2"),
        (lambda z: score_mutually(z, grid=(2, 4)), ValueError, "grid must hold P = 9 patches, got 2 x 4"),
        (lambda z: score_mutually(z[:, :0]), ValueError, "P and C at least 1"),
        (lambda z: score_against_bank(z, z[:0]), ValueError, "at least one image"),
        (lambda z: score_against_bank(z, z[..., :4]), ValueError, r"bank must be \[M, Q, 8\] like features"),
        (lambda z: score_against_bank(z, z.bfloat16()), TypeError, "bank must be torch.float32 like features"),
        (lambda z: score_against_bank(z, z[:, :4], radius=1, grid=(3, 3)), ValueError, "with a radius bank"),
        (lambda z: MutualScorer().score(z), ValueError, "bank is empty"),
        (
            lambda z: MutualScorer().extend(z).extend(z[..., :4]),
            ValueError,
            r"features must be \[N, 9, 8\] like the bank",
        ),
        (lambda z: MutualScorer().extend(z).extend(z.half()), TypeError, "torch.float32 like the bank"),
        (lambda z: MutualScorer().extend(z / 0), ValueError, "hold NaN or infinity"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(unit(4, 9, 8))  # type: ignore[operator]


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a bank")
    with pytest.raises(ValueError, match=r"x\.safetensors is no saved MutualScorer"):
        MutualScorer.load(path)
