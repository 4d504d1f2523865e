"""Inputs of sparse_encoding that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case

Make = Callable[[torch.dtype, torch.Generator], tuple]


def latents(
    dtype: torch.dtype, g: torch.Generator, tokens: int, m: int, d: int, k: int, mode: str = "topk", *,
    bias: float | None = -0.2, theta: float = 1.5, mean: float = 0.0, scale: float = 1.0,
) -> tuple:  # fmt: skip
    """Tokens and weights whose scores are of the order of `scale`; about 7 % reach a threshold of 1.5."""
    x, weight = normal(g, dtype, tokens, d, mean=mean, scale=scale), normal(g, dtype, m, d, scale=max(d, 1) ** -0.5)
    b = torch.empty(0, dtype=dtype) if bias is None else normal(g, dtype, m, mean=bias * scale, scale=0.1 * scale)
    found = (theta * scale * (0.5 + torch.rand(m, generator=g))).to(dtype) if mode == "jump_relu" else b.new_empty(0)
    return x, weight, b, found, k, mode


def _with(make: Make, change: Callable[[list, torch.Generator], None]) -> Make:
    """Another input from the tensors x, weight, bias, threshold of one."""

    def changed(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = list(make(dtype, g))
        change(args, g)
        return tuple(args)

    return changed


def _sized(tokens: int, m: int, d: int, k: int, mode: str = "topk", **options: Any) -> Make:
    return lambda t, g: latents(t, g, tokens, m, d, k, mode, **options)


def _ties(args: list, g: torch.Generator) -> None:
    x, weight, bias = args[:3]
    args[0], args[1] = (integers(g, x.dtype, *t.shape) for t in (x, weight))
    args[2] = integers(g, bias.dtype, len(bias)) - 1
    if args[3].numel():
        args[3] = integers(g, bias.dtype, len(bias), high=9)  # many scores are exactly their threshold


def _strided(args: list, g: torch.Generator) -> None:
    args[0], args[1] = strided(args[0]), strided(args[1])
    args[2] = torch.stack([args[2], torch.full_like(args[2], torch.nan)], 1)[:, 0]


def _poisoned(args: list, g: torch.Generator) -> None:
    """NaN and infinity in tokens, weights and biases: two tokens know nothing, some latents are never active."""
    args[0] = poison_row(poison_row(poison_row(args[0], 3), 5, torch.inf), 6, -torch.inf)
    args[0][7] = torch.nan
    args[1] = poison_row(poison_row(args[1], 11), 12, torch.inf)
    args[2][13], args[2][14], args[2][15], args[2][17] = torch.nan, torch.inf, -torch.inf, -torch.inf
    if args[3].numel():
        args[3][18], args[3][19], args[3][20] = torch.nan, torch.inf, -torch.inf


def _zeros(args: list, g: torch.Generator) -> None:
    """Padding tokens, dead latents, equal biases."""
    args[0][::3] = 0
    args[1][1::4] = 0
    args[2][:] = 0
    args[2][2::4] = 0.125


def _all_off(args: list, g: torch.Generator) -> None:
    args[2][:] = -100
    args[2][3] = 50


def _shared(args: list, g: torch.Generator) -> None:
    """Latents three times over, a few of them longer than all others together."""
    weight = args[1]
    weight[: len(weight) // 3] = weight[-(len(weight) // 3) :]
    weight[len(weight) // 3 :: 71] *= 1e4


def cases() -> list[Case]:
    float32 = (torch.float32,)
    middle = {mode: _sized(13, 520, 50, 12, mode=mode) for mode in ("topk", "abs_topk", "jump_relu")}
    made = [
        Case("small", _sized(6, 24, 8, 3, mode="topk"), gradient=True, compiled=True),
        Case("small_thresholds", _sized(6, 24, 8, 5, mode="jump_relu", theta=0.7), float32, compiled=True),
        Case("absolute", _sized(14, 90, 24, 5, mode="abs_topk"), gradient=True),
        Case("no_bias", _sized(9, 50, 30, 4, bias=None), gradient=True),
        Case("one", _sized(1, 1, 1, 1, bias=2.0)),
        Case("more_than_there_are", _sized(5, 4, 8, 7)),
        Case("no_tokens", _sized(0, 24, 8, 3)),
        Case("no_latents", _sized(4, 0, 8, 3, mode="jump_relu")),
        Case("across_tiles", _sized(12, 2100, 129, 32)),
        Case("all_kept", _sized(12, 70, 16, 70)),
        Case("large_mean", _sized(13, 900, 40, 9, mean=100.0)),
        Case("crowded", _sized(13, 600, 20, 4, mode="jump_relu", theta=0.01)),
        Case("strided", _with(middle["jump_relu"], _strided), float32),
        Case("all_off", _with(middle["topk"], _all_off)),
        Case("huge", _sized(13, 600, 24, 8, scale=1e30), float32),
        Case("tiny", _sized(13, 600, 24, 8, scale=1e-30), float32),
    ]
    for mode, make in middle.items():
        made += [
            Case(f"{mode}_middle", make),
            Case(f"{mode}_ties", _with(make, _ties)),
            Case(f"{mode}_not_finite", _with(make, _poisoned)),
        ]
    made += [
        Case("few_not_finite", _with(_sized(8, 60, 24, 9, mode="abs_topk"), _poisoned), float32),
        Case("zeros", _with(middle["topk"], _zeros), float32),
        Case("zeros_and_thresholds", _with(middle["jump_relu"], _zeros), float32),
        Case("uneven", _with(middle["topk"], _shared), float32),
    ]
    return made


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Values close to the reference's; each index reaches its value; a count may differ only by scores at a limit."""
    x, weight, bias, threshold, k, mode = args
    values, indices, counts = got
    assert (values.dtype, indices.dtype, counts.dtype) == (torch.float32, torch.int32, torch.int32)
    assert values.shape == want[0].shape == indices.shape
    assert counts.shape == want[2].shape
    h = x.double() @ weight.double().T + (bias.double() if bias.numel() else 0)
    lengths = [t.double().nan_to_num(0, 0, 0) for t in (x, weight)]
    slack = atol * lengths[0].norm(dim=1)[:, None] * lengths[1].norm(dim=1)[None] + torch.finfo(torch.float32).tiny
    slack = slack + (rtol * bias.double().abs().nan_to_num(0, 0, 0) if bias.numel() else 0)
    unknown = h.isnan().all(1)
    if weight.shape[0] == 0:
        unknown = torch.zeros_like(unknown)
    assert torch.equal(values.isnan().any(1), unknown), "NaN exactly where every score is NaN"
    if k <= weight.shape[0]:
        assert torch.equal(indices[unknown], torch.arange(k).int().expand(int(unknown.sum()), k))
    limit = threshold.double().clamp_min(0) if mode == "jump_relu" else torch.zeros(1, dtype=torch.float64)
    key = h.abs() if mode == "abs_topk" else h
    least, most = (((key + sign * slack) > 0) & ((key + sign * slack) >= limit) for sign in (-1, 1))
    cap = k if mode != "jump_relu" else weight.shape[0]
    assert bool((counts >= least.sum(1).clamp_max(cap))[~unknown].all()), "a latent was missed"
    assert bool((counts <= most.sum(1).clamp_max(cap))[~unknown].all()), "a latent was counted that is off"
    found = (indices >= 0) & ~unknown[:, None]
    assert torch.equal(found.sum(1)[~unknown], counts.clamp_max(k)[~unknown].long())
    assert bool((values[~found & ~unknown[:, None]] == 0).all())
    rows = torch.arange(len(x))[:, None].expand_as(indices)[found]
    chosen = indices[found].long()
    reached, room = h[rows, chosen], slack[rows, chosen]
    near = (values[found].double() - reached).abs() <= room + 6e-8 * reached.abs()
    assert bool((near | (values[found].double() == reached.float().double())).all()), "a value is not that of its index"
    assert bool(most[rows, chosen].all()), "a latent is off"
    # by rank: no larger value was left out
    best = torch.where(most, key, -torch.inf).topk(min(k, h.shape[1]), dim=1).values
    mine = torch.where(found, values.double().abs(), torch.nan)[:, : best.shape[1]]
    room = slack.amax(1, keepdim=True) if slack.shape[1] else slack.new_zeros(len(x), 1)
    enough = mine >= (best - room) * (1 - 1e-6)
    assert bool((enough | mine.isnan() | mine.isinf()).all()), "a larger value was left out"
    falling = (values.abs()[:, 1:] < values.abs()[:, :-1]) | ~found[:, 1:]
    tied = (values.abs()[:, 1:] == values.abs()[:, :-1]) & (indices[:, 1:] > indices[:, :-1])
    assert bool((falling | tied)[~unknown].all()), "not largest first, ties to the lower index"
