"""Scores of tokens against slow restatements: attention from a few queries, logits of one, similarity to anchors."""

import math
from collections.abc import Callable

import pytest
import torch

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.routing import score_by_attention, score_by_logits, score_by_similarity
from planmill.kernels.routing.token_pruning.reference import attention_score_reference

Nan = math.nan


@pytest.fixture
def heads(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """q [2, 3, 11, 8] and k of the same shape."""
    return normal(generator, torch.float32, 2, 3, 11, 8), normal(generator, torch.float32, 2, 3, 11, 8, scale=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 17, 8), (2, 2, 77, 130, 16)], ids=str)
def test_attention_scores(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    b, h, q, n, d = shape
    queries, keys = normal(generator, dtype, b, h, q, d), normal(generator, dtype, b, h, n, d)
    want = attention_score_reference(queries, keys, d**-0.5)
    got = score_by_attention(queries, keys)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    logsumexp = (queries.float() @ keys.float().transpose(-1, -2) * d**-0.5).logsumexp(-1)
    torch.testing.assert_close(score_by_attention(queries, keys, logsumexp=logsumexp), got, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(score_by_attention(strided(queries), strided(keys)), got, atol=1e-6, rtol=1e-5)


def test_attention_scores_are_rows_of_the_full_matrix(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    """FSVG (public code, MIT) restated: head-averaged attention, text rows, picture columns, mean over the text."""
    q, k = heads
    full = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1).mean(1)  # [CLS | 6 picture | 4 text]
    torch.testing.assert_close(score_by_attention(q[:, :, -4:], k)[:, 1:7], full[:, -4:, 1:7].mean(1))


def test_masked_and_nan_keys(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k = heads
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = False
    want = attention_score_reference(q[:1], k[:1, :, [0, 1, 2, *range(4, 11)]], 8**-0.5)
    got = score_by_attention(q, k, mask=mask)
    torch.testing.assert_close(got[0, mask[0]].double(), want[0], atol=1e-6, rtol=1e-5)
    assert got[0, 3] == got[1, 0] == 0
    p = score_by_logits(q[:, :, 0], k, mask=mask)
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert p[0, 3] == 0
    poisoned = k.clone()
    poisoned[:, 1, 3] = Nan  # the key of one head: -inf there, and -inf in the mean of the logits
    assert bool(score_by_attention(q, poisoned).isfinite().all())
    torch.testing.assert_close(score_by_logits(q[:, :, 0], poisoned)[0], score_by_logits(q[:, :, 0], k, mask=mask)[0])
    silent = q.clone()
    silent[:, :, 2] = Nan  # a query: left out
    left = score_by_attention(q[:, :, [0, 1, *range(3, 11)]], k)
    torch.testing.assert_close(score_by_attention(silent, k), left)
    assert bool(score_by_attention(silent[:, :, 2:3], k).isnan().all())
    assert bool(score_by_logits(silent[:, :, 2], k).isnan().all())
    nothing = torch.zeros(2, 11, dtype=torch.bool)
    assert score_by_attention(q, k, mask=nothing).tolist() == score_by_logits(q[:, :, 0], k, mask=nothing).tolist()
    assert not score_by_attention(q, k, mask=nothing).any()


def test_logit_scores(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k = heads
    logits = [
        [sum(float(q[b, h, 0].double() @ k[b, h, j].double()) for h in range(3)) / 3 / math.sqrt(8) for j in range(11)]
        for b in range(2)
    ]
    want = torch.tensor(logits, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(score_by_logits(q[:, :, 0], k).double(), want, atol=1e-6, rtol=1e-5)
    scaled = score_by_logits(q[:, :, 0] * math.sqrt(8), k, scale=1 / 8)
    torch.testing.assert_close(scaled.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_similarity_scores(reduction: str, generator: torch.Generator) -> None:
    x, anchors = normal(generator, torch.float32, 2, 9, 5), normal(generator, torch.float32, 2, 4, 5)
    x[0, 3] = 0.0
    x[1, 2, 1], anchors[1, 3, 0] = Nan, Nan
    got = score_by_similarity(x, anchors, reduction)
    for b in range(2):
        for i in range(9):
            valid = [a.double() for a in anchors[b] if bool(a.isfinite().all())]
            cosines = [float(torch.cosine_similarity(x[b, i].double(), a, 0)) for a in valid]
            want = max(cosines) if reduction == "max" else math.fsum(cosines) / len(cosines)
            assert float(got[b, i]) == pytest.approx(want, abs=1e-6, nan_ok=True)
    torch.testing.assert_close(score_by_similarity(x * 1e-20, anchors, reduction), got, equal_nan=True)
    shared = score_by_similarity(x, anchors[0], reduction)
    torch.testing.assert_close(shared[1:], score_by_similarity(x[1:], anchors[:1], reduction), equal_nan=True)
    assert bool(score_by_similarity(x, anchors[1, 3:], reduction).isnan().all())


def test_gradients_are_those_of_the_definition(generator: torch.Generator) -> None:
    q, k = (normal(generator, torch.float32, 1, 2, 5, 4).requires_grad_() for _ in range(2))
    weight = torch.rand(1, 5, generator=generator)
    (score_by_attention(q, k) * weight).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    (attention_score_reference(exact[0], exact[1], 0.5) * weight).sum().backward()
    for mine, theirs in zip((q, k), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


S, K4, X3 = torch.zeros(2, 6), torch.zeros(2, 3, 6, 4), torch.zeros(2, 6, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: score_by_attention(K4[0], K4), ValueError, r"score_by_attention: queries must be \[B, H, Q, d\], got"),
        (lambda: score_by_attention(K4, K4[0]), ValueError, r"keys must be \[B, H, L, d\], got \[3, 6, 4\]"),
        (lambda: score_by_attention(K4[:, :, :0], K4), ValueError, r"\[2, 3, Q, 4\] like keys with Q >= 1, got"),
        (lambda: score_by_attention(K4.half(), K4), TypeError, "queries must be torch.float32 like keys"),
        (lambda: score_by_attention(K4, K4, mask=S), TypeError, "mask must be bool, got torch.float32"),
        (lambda: score_by_attention(K4, K4, mask=S[:, :5] > 0), ValueError, r"mask must be \[2, 6\] like keys"),
        (lambda: score_by_attention(K4, K4, logsumexp=S), ValueError, r"logsumexp must be \[2, 3, 6\], got \[2, 6\]"),
        (lambda: score_by_logits(K4.int()[:, :, 0], K4.int()), TypeError, "keys must be float32, bfloat16 or float16"),
        (lambda: score_by_similarity(X3, X3[:1]), ValueError, r"anchors must be \[M, 4\] or \[2, M, 4\]"),
        (lambda: score_by_similarity(X3, X3, "sum"), ValueError, "reduction must be one of max, mean, got 'sum'"),
        (
            lambda: score_by_logits(K4[:, :2, 0], K4),
            ValueError,
            r"query must be \[2, 3, 4\] like keys, got \[2, 2, 4\]",
        ),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
