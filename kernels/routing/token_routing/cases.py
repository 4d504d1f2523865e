"""Inputs of token_routing that tests, benchmarks and plan checks share, and how results are compared."""

from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, strided
from planmill.kernels.common.spec import Case


def routing(
    dtype: torch.dtype, g: torch.Generator, tokens: int, experts: int, k: int, *, score: str = "softmax",
    order: str = "score_then_topk", renormalize: bool = False, eps: float = 0.0, scale: float = 1.0,
    bias: float | None = None, groups: int = 1, top_groups: int = 1, zero: bool = False, capacity: int = 0,
    capacity_group: int = 0, priority: str = "order", mean: float = 0.0, spread: float = 1.0,
) -> tuple:  # fmt: skip
    """Arguments with normal logits; `bias`: mean of a bias for the choice, or None."""
    logits = normal(g, dtype, tokens, experts, mean=mean, scale=spread)
    chooser = torch.empty(0) if bias is None else normal(g, torch.float32, experts, mean=bias, scale=0.3)
    return (logits, chooser, k, score, order, renormalize, eps, scale, groups, top_groups, zero, capacity,
            capacity_group, priority)  # fmt: skip


def _changed(args: tuple, change: Any) -> tuple:
    return change(args[0]), *args[1:]


def _spoil(logits: torch.Tensor) -> torch.Tensor:
    """NaN and infinity of every kind, each in a row of its own; two rows have nothing else."""
    logits[0, 1], logits[1, 2:], logits[2], logits[3] = torch.nan, torch.nan, torch.nan, -torch.inf
    logits[4, 3], logits[5, ::2], logits[6, 1:4] = torch.inf, -torch.inf, torch.inf
    logits[7, 0], logits[7, 1:] = torch.nan, -torch.inf
    return logits


def _offers(args: tuple) -> torch.Tensor:
    """What the choice ranks, before groups: float64 [T, E]."""
    logits, bias, _, score, order, _, _, _, groups, *_ = args
    x = logits.double().cpu().masked_fill(logits.cpu().isnan(), -torch.inf)
    by_logit = order != "score_then_topk" or not (bias.numel() or groups > 1)
    q = x if by_logit else x.softmax(1) if score == "softmax" else x.sigmoid()
    return q + bias.double().cpu() if bias.numel() else q


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Weights of each row as they should be; another expert only where two offers tie within float32 rounding.

    Rows with the experts of the definition are compared weight by weight; of the others, the offers that were chosen.
    """
    (a, idx), (b, right) = ([t.cpu() for t in pair] for pair in (got, want))
    assert (idx.dtype, a.dtype, idx.shape) == (torch.int32, torch.float32, right.shape)
    capacity, group = args[11:13]
    if capacity:
        assert_capacity(idx, args[0].shape[1], capacity, group)
    same = (idx == right).all(1)
    torch.testing.assert_close(a[same], b[same], atol=atol * abs(args[7]), rtol=rtol, equal_nan=True)
    if bool(same.all()):
        return
    offers = _offers(args)
    for t in (~same).nonzero().flatten().tolist():
        mine, theirs = idx[t].long(), right[t].long()
        assert len(set(mine[mine >= 0].tolist())) == int((mine >= 0).sum()), f"token {t} goes twice to one expert"
        assert capacity == 0 or not bool((mine < 0).logical_xor(theirs < 0).any()), f"token {t}: other drops"
        kept = mine >= 0
        gap = (offers[t, mine[kept]] - offers[t, theirs[kept]]).abs()
        allowed = 1e-6 * offers[t, theirs[kept]].abs().clamp_min(1e-3 if args[1].numel() or args[8] > 1 else 1e-30)
        group_tie = args[8] > 1 and not bool((gap <= allowed).all()) and _groups_tie(args, offers[t])
        assert group_tie or bool((gap <= allowed).all()), f"token {t}: experts {mine.tolist()}, not {theirs.tolist()}"


def _groups_tie(args: tuple, offers: torch.Tensor) -> bool:
    """Whether the last group chosen and the first left out count the same within rounding."""
    _, _, _, _, _, _, _, _, groups, top_groups, *_ = args
    best = offers.view(groups, -1).sort(1, descending=True).values[:, :2].sum(1).sort(descending=True).values
    return top_groups < groups and bool((best[top_groups - 1] - best[top_groups]).abs() <= 1e-5 * best.abs().max())


def assert_capacity(idx: torch.Tensor, experts: int, capacity: int, group: int) -> None:
    """No expert takes more tokens of a group than it may."""
    size = group or max(1, len(idx))
    for first in range(0, len(idx), size):
        part = idx[first : first + size]
        counts = torch.bincount(part[part >= 0].flatten().long(), minlength=experts)
        assert int(counts.max()) <= capacity, f"{int(counts.max())} tokens for an expert that takes {capacity}"


FLOAT32 = (torch.float32,)
DEEPSEEK: dict[str, Any] = {
    "score": "sigmoid", "renormalize": True, "eps": 1e-20, "scale": 2.5, "bias": 0.0, "groups": 4, "top_groups": 2,
}  # fmt: skip


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = FLOAT32, compiled: bool = False, change: Any = None, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            args = routing(dtype, g, *sizes, **options)
            return args if change is None else _changed(args, change)

        return Case(id, make, dtypes=dtypes, compiled=compiled)

    every = (torch.float32, torch.bfloat16, torch.float16)
    return [  # tokens, experts, k
        case("softmax", 19, 8, 2, dtypes=every),
        case("softmax_renormalized", 33, 60, 4, renormalize=True, dtypes=every),
        case("softmax_eps", 9, 7, 3, renormalize=True, eps=0.5, scale=1.5),
        case("topk_then_softmax", 17, 33, 4, order="topk_then_softmax", dtypes=every),
        case("topk_then_softmax_bias", 17, 33, 4, order="topk_then_softmax", bias=0.0),
        case("sigmoid", 21, 16, 3, score="sigmoid"),
        case("sigmoid_far_below", 21, 16, 3, score="sigmoid", renormalize=True, mean=-120.0, spread=20.0),
        case("sigmoid_far_below_eps", 21, 16, 3, score="sigmoid", renormalize=True, eps=1e-20, mean=-50.0, spread=20.0),
        case("deepseek", 13, 32, 6, compiled=True, **DEEPSEEK),
        case("deepseek_256", 11, 256, 8, **{**DEEPSEEK, "groups": 8, "top_groups": 4}, dtypes=every),
        case("negative_offers", 13, 24, 4, **{**DEEPSEEK, "bias": -2.0}),
        case("negative_offers_zero", 13, 24, 4, **{**DEEPSEEK, "bias": -2.0}, zero=True),
        case("softmax_groups", 15, 30, 5, groups=5, top_groups=2),
        case("groups_of_one", 15, 6, 2, groups=6, top_groups=3),
        case("one", 1, 1, 1),
        case("all_experts", 7, 9, 9, renormalize=True),
        case("many_experts", 3, 1024, 70, bias=0.0),
        case("past_a_block", 5, 65, 65, score="sigmoid"),
        case("ties", 40, 21, 5, change=lambda x: integers(torch.Generator().manual_seed(3), x.dtype, *x.shape)),
        case("equal", 6, 70, 4, change=torch.zeros_like),
        case("strided", 12, 10, 2, change=strided),
        case("tiny", 9, 12, 3, spread=1e-12, renormalize=True),
        case("huge", 9, 12, 3, spread=1e30),
        case("large_mean", 9, 12, 3, mean=200.0),
        case("nan", 11, 12, 4, change=_spoil, dtypes=every),
        case("nan_sigmoid", 11, 12, 4, change=_spoil, **DEEPSEEK),
        case("nan_renormalized", 11, 12, 4, change=_spoil, renormalize=True),
        case("no_tokens", 0, 8, 2),
        case("capacity", 50, 6, 2, capacity=12),
        case("capacity_groups", 50, 6, 3, capacity=5, capacity_group=16),
        case("capacity_score", 50, 6, 2, capacity=5, capacity_group=16, priority="score"),
        case("capacity_one", 12, 4, 4, capacity=1),
    ]
