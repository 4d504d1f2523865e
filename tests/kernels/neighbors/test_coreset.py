"""choose_coreset: exactly the greedy choice of float64, its promises and messages. Oracle: the definition, restated."""

import functools

import numpy as np
import pytest
import torch

from planmill import kernels
from planmill.kernels.neighbors import choose_coreset

from .test_random import WIDTHS, Draw


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def greedy(f: np.ndarray, count: int, first: int) -> list[int]:
    """The published loop, in float64."""
    chosen, nearest = [first], np.full(len(f), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, np.linalg.norm(f - f[chosen[-1]], axis=1))
        chosen.append(int(nearest.argmax()))
    return chosen


SHAPES = {"narrow": (6000, 3, 500), "wide": (600, 1100, 150), "clusters": (600, 1100, 150), "half": (600, 1100, 150)}


@functools.lru_cache
def drawn(kind: str) -> tuple[torch.Tensor, list[int]]:
    """Rows of a kind, more than are active at a time, and the right choice."""
    rows, width, count = SHAPES[kind]
    x = normal(rows, width)
    if kind == "clusters":
        x = normal(20, width, seed=1)[torch.arange(rows) % 20] + 0.3 * x
    x = x.half() if kind == "half" else x
    return x, greedy(x.double().numpy(), count, 17)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("level", kernels.cpu_capabilities())
@pytest.mark.parametrize("kind", SHAPES)
def test_the_choice_is_that_of_double_precision(kind: str, level: str) -> None:
    """Rows fall behind and catch up; distances are added up in one slice or in five."""
    x, want = drawn(kind)
    with kernels.cpu_capability(level):
        assert choose_coreset(x, len(want), start=17).tolist() == want


@pytest.mark.usefixtures("two_threads")
def test_random_inputs() -> None:
    spec = kernels.ops()["coreset"]
    assert spec.compare is not None
    for seed in range(40):
        draw = Draw(seed)
        rows, width = draw.size(1, 3, 50, 300), draw.size(*WIDTHS)
        x = draw.data(rows, width).to(draw.pick(torch.float32, torch.bfloat16, torch.float16))
        given = draw.data(rows, 1)[:, 0].abs() if draw.size(0, 0, 1) else torch.empty(0)
        args = (x, given, min(rows, draw.size(1, 5, 40)), draw.size(-1, 0, rows - 1))
        print(f"seed {seed}")  # shown by pytest where the comparison fails
        spec.compare(args, (spec.op(*args),), (spec.reference(*args),), 1e-12, 1e-12)


def test_the_seed_gives_the_start_and_leaves_the_global_generator_alone() -> None:
    x = normal(200, 16)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = (choose_coreset(x, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, second)
    assert first[0] != other[0]
    assert torch.equal(choose_coreset(x, 20, start=int(first[0])), first)


def test_a_projection_keeps_most_of_the_cover() -> None:
    """Distances in 64 of 512 dimensions are within a few tens of percent: the rows chosen there cover as well."""
    x = normal(30, 512, seed=1)[torch.arange(900) % 30] + 0.1 * normal(900, 512)
    for projection in (None, 64):
        chosen = choose_coreset(x, 30, seed=3, projection=projection).long()
        assert torch.cdist(x, x[chosen]).amin(1).max() < 5  # each cluster has its row; clusters are 32 apart
    assert torch.equal(choose_coreset(x, 30, projection=64), choose_coreset(x, 30, projection=64))


def test_features_with_a_gradient_are_projected() -> None:
    x = normal(50, 20)
    assert torch.equal(choose_coreset(x.clone().requires_grad_(), 9, projection=4), choose_coreset(x, 9, projection=4))


def test_distances_continue_a_choice() -> None:
    x = normal(300, 24)
    whole = choose_coreset(x, 40, start=5).long()
    given = torch.cdist(x.double(), x[whole[:25]].double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    rest = choose_coreset(x, 15, distances=given.float())
    assert torch.equal(rest.long(), whole[25:])


def test_equal_rows_are_chosen_in_order() -> None:
    assert choose_coreset(torch.ones(700, 9), 700, start=3).tolist() == [3, *(i for i in range(700) if i != 3)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: choose_coreset(x, 0), ValueError, "coreset: count must be from 1 to the 6 rows of features, got 0"),
        (lambda x: choose_coreset(x, 7), ValueError, "count must be from 1 to the 6 rows of features, got 7"),
        (lambda x: choose_coreset(x[:0], 1), ValueError, "from 1 to the 0 rows"),
        (lambda x: choose_coreset(x[0], 1), ValueError, r"features must be \[N, D\], got \[4\]"),
        (lambda x: choose_coreset(x[:, :0], 1), ValueError, r"with D at least 1, got \[6, 0\]"),
        (lambda x: choose_coreset(x.double(), 1), TypeError, "features must be float32, bfloat16 or float16"),
        (lambda x: choose_coreset(x, 1, start=6), ValueError, "start must be from 0 to 5, got 6"),
        (lambda x: choose_coreset(x, 1, projection=0), ValueError, "projection must be at least 1, got 0"),
        (lambda x: choose_coreset(x, 1, distances=x[:2, 0]), ValueError, r"distances must be \[6\] like features"),
        (lambda x: choose_coreset(x, 1, distances=x[:, 0].half()), TypeError, "distances must be float32"),
        (lambda x: choose_coreset(x, 1, projection=2, distances=x[:, 0]), ValueError, "not with a projection"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(6, 4))  # type: ignore[operator]
