"""Softmax attention by our op: which calls, and that they compute the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine import DynamicDim, capture
from planmill.engine.capture import Captured
from planmill.engine.rewrites import rewrite

SMALL = DynamicDim("batch", 1, 3, 4)
PASS = ["softmax_attention"]
OP = torch.ops.planmill.softmax_attention.default
attend, attend_op = F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default


class Tokens(nn.Module):
    """Self-attention out of one linear layer, and two queries that attend to its result with a scale of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.queries = nn.Parameter(torch.randn(1, 3, 2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 12))
        keys = y.unflatten(2, (3, 4)).transpose(1, 2)
        return attend(self.queries.expand(batch, -1, -1, -1), keys, v, scale=0.3).flatten(1)


def attentions(captured: Captured) -> list[Any]:
    """The calls of our op in a program, in order."""
    return [node for node in captured.program.graph.nodes if node.target is OP]


@torch.no_grad()
def test_self_and_cross_attention_compute_the_same() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    captured = capture(model, torch.rand(3, 21, 12), dynamic=SMALL)
    rewritten = rewrite(captured, PASS)
    assert rewritten.rewrites == PASS
    assert rewritten.ops == ["planmill::softmax_attention"]
    assert [node.args[3] for node in attentions(rewritten)] == [0.5, 0.3]
    assert attend_op not in {node.target for node in rewritten.program.graph.nodes}
    samples = torch.rand(3, 21, 12), 3 * torch.randn(1, 21, 12)
    found = [rewritten.program.module()(x)[0] for x in samples]
    model.double()
    for x, got in zip(samples, found, strict=True):
        assert (got - model(x.double())).abs().max() <= 2e-6


class Attention(nn.Module):
    """One call of attention on views of the input."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: attend(x, x, x, attn_mask=x @ x.mT),
        lambda x: attend(x, x, x, is_causal=True),
        lambda x: attend(x, x[:, :2], x[:, :2], enable_gqa=True),
        lambda x: attend(x, x[:, :1], x[:, :1]),
        lambda x: attend(x, x[:1], x[:1]),
        lambda x: attend(x[:, 0], x[:, 1], x[:, 2]),
    ],
    ids=["mask", "causal", "shared_heads", "one_head_of_keys", "one_sample_of_keys", "no_heads"],
)
def test_other_attention_stays_as_it_is(call: Callable[..., torch.Tensor]) -> None:
    captured = capture(Attention(call).eval(), torch.rand(3, 4, 5, 8), dynamic=SMALL)
    assert rewrite(captured, PASS) is captured


def _written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


@pytest.mark.parametrize(
    ("call", "scale"),
    [
        (lambda x: _written(x, x + 1, 2 * x), 0.5),
        (lambda x: F.softmax((x / 3) @ (2 * x).transpose(2, 3) / 4, dim=3) @ x, 1 / 12),
        (lambda x: F.dropout((x @ x.permute(0, 1, 3, 2)).softmax(-1), 0.5, training=False).matmul(x[..., :3]), 1.0),
        (lambda x: _written(x[:, 0], x[:, 1, :2], x[:, 2, :2]), 0.5),
        (lambda x: torch.bmm((0.25 * torch.bmm(x[:, 0], x[:, 1].mT)).softmax(-1), x[:, 2]), 0.25),
        (lambda x: _written(_written(x, x, x), x, _written(x, x, 3 * x)), 0.5),
        (lambda x: _written(x, x, attend(x, x, x)), 0.5),
        (lambda x: _written(x.bfloat16() * torch.tensor([2.0], dtype=x.dtype), x, x), 0.5),
    ],
    ids=["scores", "everywhere", "dropout", "one_head", "bmm", "one_into_another", "called_too", "q_of_16_bits"],
)
@torch.no_grad()
def test_attention_that_is_written_out(call: Callable[..., torch.Tensor], scale: float) -> None:
    torch.manual_seed(0)
    captured = capture(Attention(call).eval(), torch.rand(3, 4, 5, 8), dynamic=SMALL)
    rewritten = rewrite(captured, PASS)
    assert rewritten.rewrites == PASS
    targets = {node.target for node in rewritten.program.graph.nodes}
    assert not targets & {torch.ops.aten.matmul.default, torch.ops.aten.softmax.int, attend_op}
    assert attentions(rewritten)[-1].args[3] == pytest.approx(scale)
    for x in (torch.rand(3, 4, 5, 8), 3 * torch.randn(1, 4, 5, 8)):
        assert (rewritten.program.module()(x)[0] - call(x.double())).abs().max() <= 3e-6


@pytest.mark.parametrize(
    "call",
    [
        lambda x: (weights := (x @ x.mT).softmax(-1)) @ x + weights.sum(),
        lambda x: (scores := x @ x.mT).softmax(-1) @ x + scores.sum(),
        lambda x: (scores := 2 * (x @ x.mT)).softmax(-1) @ x + scores.sum(),
        lambda x: (x @ x.mT).softmax(2) @ x,
        lambda x: (x @ x.mT + torch.eye(5)).softmax(-1) @ x,
        lambda x: (x @ x.mT + 1).softmax(-1) @ x,
        lambda x: (x @ x.mT * torch.arange(1.0, 5.0).view(4, 1, 1)).softmax(-1) @ x,
        lambda x: (x @ x.mT).softmax(-1) @ x[:, :1],
        lambda x: (x @ x[0].mT).softmax(-1) @ x,
        lambda x: (x @ x.mT).softmax(-1, dtype=torch.float64).float() @ x,
        lambda x: x @ (x.mT @ x).softmax(-1),
    ],
    ids=[
        *("weights_seen", "scores_seen", "scaled_scores_seen", "over_queries", "bias", "shift", "temperature_by_head"),
        *("one_head_of_values", "keys_of_one_sample", "other_dtype", "other_side"),
    ],
)
def test_what_only_looks_like_attention_stays_as_it_is(call: Callable[..., torch.Tensor]) -> None:
    captured = capture(Attention(call).eval(), torch.rand(3, 4, 5, 8), dynamic=SMALL)
    assert rewrite(captured, PASS) is captured
