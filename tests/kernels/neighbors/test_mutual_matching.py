"""match_mutually: what the registry's cases do not say."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from planmill.kernels import cpu_capabilities, cpu_capability, ops
from planmill.kernels.neighbors import list_matches, match_mutually


def maps(g: torch.Generator, n: int, m: int, d: int, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps, of which the shorter's rows all have a noisy copy in the other."""
    shared = torch.randn(max(n, m), d, generator=g)
    order = torch.randperm(max(n, m), generator=g)
    return shared[:n], (shared[order] + noise * torch.randn(max(n, m), d, generator=g))[:m]


@pytest.mark.parametrize("ratio", [None, 0.8])
def test_agrees_with_scikit_learn(generator: torch.Generator, ratio: float | None) -> None:
    """The neighbours of scikit-learn (BSD-3), brute force in float64, from either side."""
    a, b = maps(generator, 150, 210, 48, noise=1.2)
    z_a, z_b = (torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (a, b))
    there, index = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(z_b).kneighbors(z_a)
    back, index_back = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(z_a).kneighbors(z_b)
    limit = ratio or 1.0
    want = {
        (i, int(j))
        for i, j in enumerate(index[:, 0])
        if index_back[j, 0] == i and there[i, 0] <= limit * there[i, 1] and back[j, 0] <= limit * back[j, 1]
    }
    got = match_mutually(a, b, ratio=ratio)
    pairs, scores = list_matches(got)
    assert 20 < len(want) < 150
    assert {tuple(pair) for pair in pairs.tolist()} == want
    torch.testing.assert_close(scores, (a[pairs[:, 0]] * b[pairs[:, 1]]).sum(1) / a[pairs[:, 0]].norm(dim=1)
                               / b[pairs[:, 1]].norm(dim=1), atol=1e-6, rtol=0)  # fmt: skip
    assert got.nearest.tolist() == index[:, 0].tolist()
    assert got.nearest_back.tolist() == index_back[:, 0].tolist()


@pytest.mark.parametrize("ratio", [None, 0.9])
def test_a_match_has_no_direction(generator: torch.Generator, ratio: float | None) -> None:
    a, b = maps(generator, 140, 133, 64)
    a[5], b[7] = 0.0, torch.nan
    there, back = (list_matches(match_mutually(*both, ratio=ratio))[0] for both in ((a, b), (b, a)))
    assert len(there) > 50
    assert sorted(there.tolist()) == sorted(back.flip(1).tolist())


def test_an_entry_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    a, b = (torch.randn(3, rows, 40, generator=generator) for rows in (150, 131))
    together = match_mutually(a, b, ratio=0.95)
    for entry in range(3):
        alone = match_mutually(a[entry], b[entry], ratio=0.95)
        assert all(torch.equal(x[entry], y) for x, y in zip(together, alone, strict=True))
    pairs, scores = list_matches(together)
    assert pairs.shape[1] == 3
    assert torch.equal(together.indices[pairs[:, 0], pairs[:, 1]], pairs[:, 2])
    assert torch.equal(together.scores[pairs[:, 0], pairs[:, 1]], scores)


@pytest.mark.parametrize("level", cpu_capabilities())
@pytest.mark.parametrize("kind", ["alike", "copies", "across"])
def test_bytes_that_say_too_little(generator: torch.Generator, kind: str, level: str) -> None:
    """Long lists of open pairs, which 16 bits settle; and several blocks of columns and of rows."""
    spec = ops()["mutual_matching"]
    a, b = (torch.randn(1, rows, 24, generator=generator) for rows in (390, 2060))
    if kind == "alike":  # but for a few rows, which hold the scale
        a, b = (torch.cat([x[:, :4], x[:, :1] + 1e-3 * x[:, 4:]], 1) for x in (a, b))
    if kind == "copies":
        a, b = (x[:, torch.arange(x.shape[1]) % 3] for x in (a, a.repeat(1, 6, 1)[:, :2060]))
    for ratio in (1.0, 0.9):
        args = (a, b, a[..., :0], b[..., :0], 1.0, 1.0, ratio)
        with cpu_capability(level):
            got = spec.op(*args)
        assert spec.compare is not None
        spec.compare(args, got, spec.reference(*args), 0.0, 0.0)


def test_two_features_are_weighed(generator: torch.Generator) -> None:
    a, a2 = (torch.randn(20, d, generator=generator) for d in (8, 5))
    b, b2 = a.flip(0), a2.roll(3, 0)  # each feature alone says something else
    own = torch.arange(20, dtype=torch.int32)
    first = match_mutually(a, b, second=(a2, b2), weights=(1.0, 1e-3))
    assert torch.equal(first.indices, 19 - own)
    torch.testing.assert_close(first.scores, torch.ones(20), atol=1e-5, rtol=0)
    last = match_mutually(a, b, second=(a2, b2), weights=(1e-3, 2.0))
    assert torch.equal(last.indices, (own + 3) % 20)
    torch.testing.assert_close(last.scores, torch.full((20,), 4.0), atol=1e-5, rtol=0)


def test_near_duplicates_are_told_apart() -> None:
    """Cosines of all pairs round to one in float32; distances by differences do not."""
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(3)), dim=0)
    a = torch.ones(40, 32) + 1e-4 * torch.arange(40)[:, None] * direction
    found = match_mutually(a, a.flip(0) * 3.0)
    assert torch.equal(found.indices, 39 - torch.arange(40, dtype=torch.int32))


X = torch.ones(4, 3)
ERRORS = {
    "rank": (lambda: match_mutually(X[0], X), ValueError, r"a must be \[n, D\] or \[B, n, D\], got \[3\]"),
    "width": (lambda: match_mutually(X, X[:, :2]), ValueError, r"b must be \[m, 3\] like a, got \[4, 2\]"),
    "batch": (lambda: match_mutually(X[None], X.expand(2, 4, 3)), ValueError, r"b must be \[1, m, 3\] like a"),
    "empty": (lambda: match_mutually(X[:, :0], X[:, :0]), ValueError, "with D at least 1"),
    "dtype": (lambda: match_mutually(X.double(), X), TypeError, "a must be float32, bfloat16 or float16"),
    "dtypes": (lambda: match_mutually(X, X.half()), TypeError, "b must be torch.float32 like a"),
    "second": (lambda: match_mutually(X, X, second=(X[:2], X)), ValueError, r"second\[0\] must be \[4, D2\]"),
    "widths": (lambda: match_mutually(X, X, second=(X, X[:, :1])), ValueError, "two maps of one width, got 3 and 1"),
    "weights": (lambda: match_mutually(X, X, weights=(0.0, 1.0)), ValueError, "weights must be two numbers above 0"),
    "ratio": (lambda: match_mutually(X, X, ratio=1.5), ValueError, "ratio must be above 0 and at most 1, got 1.5"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"mutual_matching: .*{message}"):
        call()
