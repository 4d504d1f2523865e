"""Token pruning against slow restatements of the published procedures; edges, batches, compile, export, errors."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planmill.kernels.common.inputs import integers, normal
from planmill.kernels.routing import (
    TokenEliminator,
    TokenSelector,
    eliminate_tokens,
    gather_tokens,
    scatter_tokens,
    score_by_attention,
    score_by_logits,
    score_by_similarity,
    select_tokens,
)
from planmill.kernels.routing.token_pruning.reference import (
    kept_reference,
    removed_reference,
    smoothed_reference,
)

Nan = math.nan


def kept(indices: torch.Tensor) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in indices.tolist()]


# --- a fixed number ---


def test_published_lengths_of_fsvg() -> None:
    lengths = [576]
    for _ in range(3):
        lengths.append(select_tokens(torch.zeros(1, lengths[-1]), 0.7).shape[1])
    assert lengths == [576, 404, 283, 199]


@pytest.mark.parametrize("keep", [0.7, 0.5, 1.0, 0.01])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
def test_selection(keep: float, kind: str, generator: torch.Generator) -> None:
    for tokens in (1, 2, 10, 97):
        scores = normal(generator, torch.float32, 3, tokens) if kind == "normal" else torch.zeros(3, tokens)
        scores = integers(generator, torch.float32, 3, tokens, high=4) if kind == "ties" else scores
        best = select_tokens(scores, keep, order="score")
        assert best.dtype is torch.int32
        assert best.tolist() == [kept_reference(row, keep) for row in scores.tolist()]
        assert select_tokens(scores, keep).tolist() == [sorted(row) for row in best.tolist()]
        assert torch.equal(select_tokens(scores, best.shape[1], order="score"), best)
        assert torch.equal(select_tokens(scores[1:2], keep, order="score"), best[1:2])


def test_selection_with_nan_and_infinity() -> None:
    scores = torch.tensor([[Nan, 1.0, -math.inf, math.inf, 1.0], [Nan] * 5])
    assert select_tokens(scores, 5, order="score").tolist() == [[3, 1, 4, 0, 2], [0, 1, 2, 3, 4]]
    assert select_tokens(torch.zeros(2, 0), 0.7).shape == (2, 0)
    assert select_tokens(torch.zeros(0, 4), 0.7).shape == (0, 3)
    assert select_tokens(torch.zeros(1, 4), 0).shape == (1, 0)


def test_gather_and_scatter(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 2, 9, 3)
    indices = torch.tensor([[4, 0, 2, -1], [1, -1, -1, 3]])
    y = gather_tokens(x, indices, first=1, count=5)
    for b in range(2):
        chosen = [torch.zeros(3) if i < 0 else x[b, 1 + i] for i in indices[b].tolist()]
        assert torch.equal(y[b], torch.stack([x[b, 0], *chosen, *x[b, 6:]]))
    back = scatter_tokens(y[:, 1:5], indices.int(), 5)
    for b in range(2):
        for i in range(5):
            assert torch.equal(back[b, i], x[b, 1 + i] if i in indices[b].tolist() else torch.zeros(3))
    assert torch.equal(gather_tokens(x, torch.full((2, 2), -1), first=9)[:, 9:], torch.zeros(2, 2, 3))
    assert torch.equal(gather_tokens(x, indices[:, :0], count=2), x[:, 2:])
    x.requires_grad_()
    gather_tokens(x, indices, first=1, count=5).sum().backward()
    assert x.grad is not None
    assert x.grad[:, :, 0].tolist() == [[1, 1, 0, 1, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1, 1, 1]]


def test_selector_keeps_class_and_text_in_place(generator: torch.Generator) -> None:
    x, scores = normal(generator, torch.float32, 2, 1 + 10 + 4, 6), torch.rand(2, 10, generator=generator)
    y, chosen = TokenSelector()(x, scores)
    assert y.shape == (2, 1 + 7 + 4, 6)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[:, 8:], x[:, 11:])
    for b in range(2):
        best = kept_reference(scores[b].tolist(), 0.7)
        assert chosen[b].tolist() == best
        assert torch.equal(y[b, 1:8], x[b, [1 + i for i in best]])


# --- a number that depends on the scores ---


def eliminated(
    scores: torch.Tensor, grid: tuple[int, int], positions: list[list[int]], threshold: float, coupled: bool
) -> tuple[list[list[int]], bool]:
    """EEVG without sparing (its public code has no licence: from a description); and whether rounding cannot show."""
    smooth = [smoothed_reference(p, at, grid) for p, at in zip(scores.tolist(), positions, strict=True)]
    sizes = [removed_reference(p, threshold) for p in smooth]
    if coupled:
        sizes = [min(sizes)] * len(sizes)
    result, clear = [], True
    for p, size in zip(smooth, sizes, strict=True):
        order = sorted(range(len(p)), key=lambda i: -p[i])
        result.append(sorted(order[: len(p) - size]))
        span = (max(p) - min(p)) or 1.0
        values = sorted((v - min(p)) / span for v in p)
        clear &= all(abs(v - threshold) > 1e-5 for v in values)
        clear &= all(b - a > 1e-6 for a, b in itertools.pairwise(values))
    return result, clear


@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "coupled"])
def test_elimination_on_random_pictures(coupled: bool) -> None:
    compared = 0
    for seed in range(120):
        g = torch.Generator().manual_seed(seed)
        h, w = (int(torch.randint(1, 8, (1,), generator=g)) for _ in range(2))
        batch, cells = int(torch.randint(1, 4, (1,), generator=g)), h * w
        tokens = int(torch.randint(1, cells + 1, (1,), generator=g))
        positions = torch.stack([torch.randperm(cells, generator=g)[:tokens].sort().values for _ in range(batch)])
        scores = (torch.randn(batch, tokens, generator=g) * 2).softmax(1)
        threshold = (0.0, 0.015, 0.2, 0.6, 1.0)[seed % 5]
        want, clear = eliminated(scores, (h, w), positions.tolist(), threshold, coupled)
        got, lengths = eliminate_tokens(
            scores, (h, w), positions=positions.int(), threshold=threshold, retention=0.0, coupled=coupled
        )
        assert got.shape == (batch, tokens)
        assert lengths.tolist() == [len(row) for row in kept(got)]
        if clear:
            compared += 1
            assert kept(got) == want, f"seed {seed}"
    assert compared > 60


def test_elimination_by_hand() -> None:
    """One bright corner on 3 x 3: its neighbours keep a share of it, the far cells none."""
    scores = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0, 0, 0]])
    # corner: 4 cells inside (9 + 0 + 0 + 0) + 5 outside as the centre = (9 + 45) / 9 = 6; its 3 neighbours: 9 / 9 = 1
    indices, lengths = eliminate_tokens(scores, (3, 3), threshold=0.1, retention=0.0)
    assert indices.tolist() == [[0, 1, 3, 4, -1, -1, -1, -1, -1]]
    assert lengths.tolist() == [4]
    assert kept(eliminate_tokens(scores, (3, 3), threshold=0.2, retention=0.0)[0]) == [[0]]
    both = torch.cat([scores, torch.arange(9.0)[None]])
    alone, lengths = eliminate_tokens(both, (3, 3), threshold=0.1, retention=0.0)
    assert lengths[0] == 4
    assert lengths[1] > 4
    together, lengths = eliminate_tokens(both, (3, 3), threshold=0.1, retention=0.0, coupled=True)
    assert lengths[0] == lengths[1] == lengths.new_tensor(len(kept(alone)[1]))
    assert kept(together)[0] == [0, 1, 2, 3, 4, 5, 6, 7][: int(lengths[0])]  # ties: the higher index goes first


@pytest.mark.parametrize("value", [0.0, 1 / 12, 1e-30, 7e20])
def test_constant_scores_remove_nothing(value: float) -> None:
    scores = torch.full((2, 12), value)
    scores[1] = torch.arange(12.0)
    indices, lengths = eliminate_tokens(scores, (3, 4), threshold=0.5, retention=0.0)
    assert lengths[0] == 12
    assert lengths[1] < 12
    assert indices[0].tolist() == list(range(12))
    assert eliminate_tokens(scores, (3, 4), threshold=0.5, retention=0.0, coupled=True)[1].tolist() == [12, 12]


def test_nan_counts_as_the_lowest_score(generator: torch.Generator) -> None:
    scores = torch.rand(3, 12, generator=generator)
    clean = scores.clone()
    scores[0, 5] = Nan
    clean[0, 5] = clean[0, [*range(5), *range(6, 12)]].min()
    scores[2] = Nan
    got, want = (eliminate_tokens(s, (3, 4), threshold=0.4, retention=0.0)[0] for s in (scores, clean))
    assert torch.equal(got[:2], want[:2])
    assert got[2].tolist() == list(range(12))


def test_sparing_is_repeatable_and_about_its_share(generator: torch.Generator) -> None:
    scores = torch.rand(4, 1024, generator=generator) ** 8
    options: dict[str, Any] = {"threshold": 0.5}
    none, few = (eliminate_tokens(scores, (32, 32), retention=p, **options) for p in (0.0, 0.1))
    gone = 1024 - none[1]
    assert bool((gone > 300).all())
    share = (few[1] - none[1]).double() / gone
    assert bool(((share > 0.05) & (share < 0.16)).all())
    for b in range(4):
        assert set(kept(none[0])[b]) <= set(kept(few[0])[b])
    assert torch.equal(eliminate_tokens(scores, (32, 32), **options)[0], few[0])  # 0.1 is the default
    assert not torch.equal(eliminate_tokens(scores, (32, 32), seed=1, **options)[0], few[0])
    assert torch.equal(eliminate_tokens(scores[2:3], (32, 32), **options)[0], few[0][2:3])
    assert bool((eliminate_tokens(scores, (32, 32), retention=1.0, **options)[1] == 1024).all())
    lengths = eliminate_tokens(scores, (32, 32), coupled=True, **options)[1]
    assert len(set(lengths.tolist())) == 1
    totals = [int(eliminate_tokens(scores, (32, 32), seed=s, **options)[1].sum() - none[1].sum()) for s in range(40)]
    assert sum(totals) / 40 / float(gone.sum()) == pytest.approx(0.1, abs=0.01)


def test_absent_tokens_change_nothing(generator: torch.Generator) -> None:
    """A padded sequence gives what the short one gives, whatever stands in the padding."""
    scores, positions = torch.rand(1, 9, generator=generator), torch.randperm(20, generator=generator)[None, :9]
    short, lengths = eliminate_tokens(scores, (4, 5), positions=positions, threshold=0.4, retention=0.3)
    for junk in (0.0, 5.0, Nan):
        padded = torch.cat([scores, torch.full((1, 4), junk)], 1)
        at = torch.cat([positions, torch.tensor([[-1, -1, 20, -7]])], 1)
        got, count = eliminate_tokens(padded, (4, 5), positions=at, threshold=0.4, retention=0.3)
        assert kept(got) == kept(short)
        assert torch.equal(count, lengths)


def test_eliminator_from_layer_to_layer(generator: torch.Generator) -> None:
    """Two layers on padded sequences and on trimmed ones: the same tokens at the same cells."""
    x = normal(generator, torch.float32, 2, 1 + 30, 8)
    full, short = (TokenEliminator((5, 6), 0.3, retention=0.2, trim=trim) for trim in (False, True))
    state: list[tuple[torch.Tensor, torch.Tensor | None]] = [(x, None), (x, None)]
    for _ in range(2):
        for i, layer in enumerate((full, short)):
            y, positions = state[i]
            mask = None if positions is None else positions >= 0
            scores = score_by_logits(y[:, None, 0], y[:, None, 1:], mask=mask)
            y, positions, lengths = layer(y, scores, positions)
            assert bool((lengths < 30).all())
            assert torch.equal((positions >= 0).sum(1), lengths)
            state[i] = (y, positions)
    for (y, positions), wide in ((state[0], 30), (state[1], int(lengths.max()))):
        assert y.shape == (2, 1 + wide, 8)
        assert positions is not None
        picture = scatter_tokens(y[:, 1:], positions, 30)
        kept_cells = torch.zeros(2, 31).scatter(1, torch.where(positions < 0, 30, positions).long(), 1.0)[:, :30]
        torch.testing.assert_close(picture, x[:, 1:] * kept_cells[..., None])
        assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(state[0][0][:, : 1 + wide], state[1][0])


def test_empty_inputs() -> None:
    for shape in ((0, 6), (2, 0)):
        positions = None if shape[1] else torch.zeros(shape, dtype=torch.int32)
        indices, lengths = eliminate_tokens(torch.zeros(shape), (2, 3), positions=positions, coupled=True)
        assert (indices.shape, indices.dtype, lengths.shape) == (shape, torch.int32, shape[:1])
    y, positions, lengths = TokenEliminator((2, 3), trim=True)(torch.zeros(0, 7, 4), torch.zeros(0, 6))
    assert (y.shape, positions.shape, lengths.shape) == ((0, 1, 4), (0, 0), (0,))


# --- graphs ---


class Pruned(nn.Module):
    """One elimination and one selection, as two blocks of a model would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.eliminator = TokenEliminator((3, 4), 0.3, coupled=True)
        self.selector = TokenSelector(0.5, order="position")
        self.qk = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k = self.qk(x).unflatten(2, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        x, positions, lengths = self.eliminator(x, score_by_logits(q[:, :, 0], k[:, :, 1:]))
        mask = torch.cat([torch.ones_like(positions[:, :1]), positions], 1) >= 0
        x, chosen = self.selector(x, score_by_attention(q[:, :, :3], k, mask=mask)[:, 1:])
        return x, positions, lengths, chosen


def test_compiles_and_exports_with_a_dynamic_batch(generator: torch.Generator) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Pruned().eval(), normal(generator, torch.float32, 3, 13, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    other = normal(generator, torch.float32, 7, 13, 8)
    for got, want in zip(program.module()(other), model(other), strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_reach_the_tokens_that_stay(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 2, 13, 8).requires_grad_()
    scores = torch.rand(2, 12, generator=generator).requires_grad_()
    y, positions, _ = TokenEliminator((3, 4), 0.5, retention=0.0)(x, scores)
    y.sum().backward()
    assert x.grad is not None
    for b in range(2):
        cells = [c for c in positions[b].tolist() if c >= 0]
        assert 0 < len(cells) < 12
        assert x.grad[b].any(1).nonzero().flatten().tolist() == [0, *(1 + c for c in cells)]
    assert scores.grad is None


S, X3 = torch.zeros(2, 6), torch.zeros(2, 6, 4)
I2 = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: score_by_similarity(X3, X3[:, :0]),
            ValueError,
            r"\[M, 4\] or \[2, M, 4\] with M >= 1, got \[2, 0, 4\]",
        ),
        (lambda: select_tokens(S, 0.0), ValueError, "above 0 and at most 1, got 0.0"),
        (lambda: select_tokens(S, 7), ValueError, "select_tokens: a number to keep must be 0 to 6, got 7"),
        (lambda: select_tokens(S, 2, order="best"), ValueError, "order must be one of score, position"),
        (lambda: select_tokens(S.int(), 2), TypeError, "scores must be float32, bfloat16 or float16"),
        (lambda: eliminate_tokens(S, (2, 4)), ValueError, "grid must hold N = 6 tokens, got 2 x 4; or give positions"),
        (lambda: eliminate_tokens(S, (2, 3), threshold=1.5), ValueError, "must be 0 to 1, got 1.5 and 0.1"),
        (lambda: eliminate_tokens(S, (2, 3), retention=Nan), ValueError, "must be 0 to 1, got 0.015 and nan"),
        (lambda: eliminate_tokens(S, (2, 3), positions=S), TypeError, "positions must be int32 or int64"),
        (lambda: eliminate_tokens(S, (2, 3), positions=I2), ValueError, r"positions must be \[2, 6\] like scores"),
        (lambda: gather_tokens(X3, I2, first=5, count=2), ValueError, "tokens 5 to 7 are not within the 6 of x"),
        (lambda: gather_tokens(X3, I2[:1]), ValueError, r"gather_tokens: indices must be \[2, K\], got \[1, 3\]"),
        (lambda: gather_tokens(X3, I2.float()), TypeError, "indices must be int32 or int64, got torch.float32"),
        (lambda: scatter_tokens(X3, I2, 6), ValueError, r"indices must be \[2, 6\] and count >= 0, got \[2, 3\] and 6"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
