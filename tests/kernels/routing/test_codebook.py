"""Codebook against the published formulas (matmul, topk); state dicts, disabled codes, groups, gradient."""

import pytest
import torch

from planmill.kernels.routing import Codebook, GroupedCodebook


def published(book: Codebook, x: torch.Tensor, *, off: tuple[int, ...] = (), keep_k: bool = True) -> torch.Tensor:
    """Logits [T, M], topk, gather, sum / k, in float64; the divisor is k whatever was switched off."""
    weight = book.codebook.weight.double()
    u = torch.nn.functional.layer_norm(x.double(), x.shape[-1:], book.ln.weight.double(), book.ln.bias.double(), 1e-5)
    logits = u @ weight.T / weight.norm(dim=1) if book.metric == "cosine" else -torch.cdist(u, weight)
    if keep_k:
        logits[..., list(off)] = -torch.inf
    indices = logits.topk(book.k, dim=-1).indices
    codes = weight[indices]
    if not keep_k:
        codes = torch.where(torch.isin(indices, torch.tensor(off))[..., None], 0, codes)
    return codes.sum(-2) / book.k


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(("shape", "codes", "k"), [((3, 17, 48), 700, 8), ((1, 40), 33, 1), ((197, 64), 2000, 5)])
def test_is_the_published_formula(metric: str, shape: tuple[int, ...], codes: int, k: int) -> None:
    book = Codebook(shape[-1], codes, k, metric).requires_grad_(False)
    book.ln.weight.normal_()
    book.ln.bias.normal_()
    x = inputs(*shape)
    torch.testing.assert_close(book(x).double(), published(book, x), atol=1e-5, rtol=1e-5)
    assert book.nearest(x).shape == (*shape[:-1], k)


def test_the_sum_is_k_means() -> None:
    mean, total = (Codebook(24, 50, 4, reduction=r).requires_grad_(False) for r in ("mean", "sum"))
    total.load_state_dict(mean.state_dict())
    torch.testing.assert_close(total(inputs(9, 24)), 4 * mean(inputs(9, 24)))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("keep_k", [True, False])
def test_disabled_codes(metric: str, keep_k: bool) -> None:
    book, x = Codebook(32, 60, 6, metric).requires_grad_(False), inputs(25, 32)
    plain = book(x)
    off = tuple(int(i) for i in book.nearest(x)[:, 0].unique())[:20]
    book.disable(off, keep_k=keep_k)
    torch.testing.assert_close(book(x).double(), published(book, x, off=off, keep_k=keep_k), atol=1e-5, rtol=1e-5)
    assert not torch.isin(book.nearest(x), torch.tensor(off)).any()
    assert bool((book.nearest(x) == -1).any()) is not keep_k
    torch.testing.assert_close(book.disable([])(x), plain, atol=0, rtol=0)


def test_a_code_of_length_zero_and_one_that_holds_nan() -> None:
    book, x = Codebook(16, 40, 3, "cosine").requires_grad_(False), inputs(12, 16)
    book.codebook.weight[5] = 0
    book.codebook.weight[6] = torch.nan
    assert book(x).isfinite().all()
    assert not (book.nearest(x) == 6).any()


def test_published_state_dicts_load() -> None:
    single = {"codebook.weight": inputs(30, 12), "ln.weight": inputs(12), "ln.bias": inputs(12)}
    Codebook(12, 30, 2).load_state_dict(single)
    grouped = {f"codebook.{g}.{key}": value for g in range(3) for key, value in single.items()}
    book = GroupedCodebook(36, 30, 3, 2)
    book.load_state_dict(grouped)
    x = inputs(7, 36)
    want = torch.cat([published(book.codebook[g], x[:, 12 * g : 12 * g + 12]) for g in range(3)], 1)
    torch.testing.assert_close(book(x).double(), want, atol=1e-5, rtol=1e-5)


def test_the_gradient_goes_straight_through() -> None:
    book, x = Codebook(16, 90, 4, "cosine"), inputs(11, 16).requires_grad_()
    weight = inputs(11, 16)
    (book(x) * weight).sum().backward()
    u = torch.nn.functional.layer_norm(x, (16,), book.ln.weight, book.ln.bias, 1e-5)
    (through,) = torch.autograd.grad((u * weight).sum(), x)
    torch.testing.assert_close(x.grad, through)
    want = torch.zeros_like(book.codebook.weight)
    for j in range(4):
        want.index_add_(0, book.nearest(x)[:, j].long(), weight / 4)
    torch.testing.assert_close(book.codebook.weight.grad, want, atol=1e-6, rtol=1e-5)


def test_no_tokens() -> None:
    assert Codebook(8, 20, 3)(torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Codebook(8, 4, 5), "Codebook: k must be from 1 to 4, got 5"),
        (lambda: Codebook(8, 4, 2, "dot"), "metric must be one of cosine, l2, got 'dot'"),
        (lambda: Codebook(8, 4, 2, reduction="max"), "reduction must be one of mean, sum"),
        (lambda: Codebook(8, 4, 2).disable([4]), "codes must be from 0 to 3, got 4 to 4"),
        (lambda: Codebook(8, 4, 2).disable([0, 1, 2]), "2 codes must stay on, 1 do"),
        (lambda: GroupedCodebook(8, 4, 3), "channels must be a multiple of groups, got 8 and 3"),
    ],
)
def test_messages(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
