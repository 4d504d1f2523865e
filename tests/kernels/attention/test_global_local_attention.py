"""Attention rollout by its row against the whole product, and attention from the patches that it chooses."""

from typing import Any

import pytest
import torch

from planmill.kernels.attention import GlobalLocalAttention, roll_out_row
from planmill.kernels.attention.global_local_attention.reference import rollout_reference


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(count: int, *shape: int, scale: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [normal(*shape, seed=s) * scale for s in range(count)], [normal(*shape, seed=90 + s) for s in range(count)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 29])
def test_row_of_the_product(count: int, tokens: int, chunk: int) -> None:
    queries, keys = layers(count, 2, 3, tokens, 8, scale=3.0)
    product = rollout_reference(queries, keys, 8**-0.5)
    for row in {0, tokens - 1, -1}:
        got = roll_out_row(queries, keys, row=row, chunk=chunk)
        torch.testing.assert_close(got.double(), product[:, row], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strided_and_other_heads(dtype: torch.dtype) -> None:
    queries, keys = ([x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in side]
                     for side in layers(3, 2, 2, 13, 8))  # fmt: skip
    queries[1], keys[1] = normal(2, 4, 13, 6).to(dtype), normal(2, 4, 13, 6, seed=3).to(dtype)
    got = roll_out_row(queries, keys, scale=0.5)
    torch.testing.assert_close(got.double(), rollout_reference(queries, keys, 0.5)[:, 0], atol=1e-6, rtol=1e-5)
    alone = roll_out_row([q[1:] for q in queries], [k[1:] for k in keys], scale=0.5)
    torch.testing.assert_close(alone, got[1:], atol=1e-7, rtol=1e-6)


def test_chosen_patches_attend_to_all() -> None:
    layer, x, scores = GlobalLocalAttention(16, 4, 0.3), normal(3, 12, 16), normal(3, 11, seed=1)
    got, indices = layer(x.transpose(0, 1).contiguous().transpose(0, 1), scores)
    assert indices.shape == (3, 4)
    assert indices.dtype == torch.int32
    wide, weights = x.double(), {name: p.detach().double() for name, p in layer.named_parameters()}
    q, kv = wide @ weights["q.weight"].T + weights["q.bias"], wide @ weights["kv.weight"].T + weights["kv.bias"]
    for b in range(3):
        best = sorted(range(11), key=lambda i: -float(scores[b, i]))[:4]
        assert indices[b].tolist() == best
        rows = torch.tensor([0, *(1 + i for i in best)])
        heads = [
            (q[b, rows, h : h + 4] @ kv[b, :, h : h + 4].T / 2).softmax(1) @ kv[b, :, 16 + h : 20 + h]
            for h in range(0, 16, 4)
        ]
        want = torch.cat(heads, 1) @ weights["proj.weight"].T + weights["proj.bias"]
        torch.testing.assert_close(got[b].double(), want, atol=1e-5, rtol=1e-5)
    alone, _ = layer(x[1:2], scores[1:2])
    torch.testing.assert_close(alone, got[1:2], atol=1e-6, rtol=1e-6)


class Branch(torch.nn.Module):
    """Rollout of two layers' attention, then the cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32)
        self.local = GlobalLocalAttention(16, 2, 0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides = [
            layer(x).unflatten(2, (2, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0) for layer in (self.first, self.second)
        ]
        return self.local(x, roll_out_row([q for q, _ in sides], [k for _, k in sides], chunk=5)[:, 1:])[0]


def test_gradient_graph_and_export() -> None:
    model, x = Branch(), normal(2, 13, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.local.parameters())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        more = normal(5, 13, 16, seed=3)
        torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: roll_out_row([], []), ValueError, "keys must hold as many layers as queries, 1 or more, got 0, 0"),
        (lambda q: roll_out_row([q], [q, q]), ValueError, "as many layers as queries, 1 or more, got 2, 1"),
        (lambda q: roll_out_row([q[0]], [q]), ValueError, r"queries\[0\] must be \[B, H, N, d\], got \[3, 5, 4\]"),
        (lambda q: roll_out_row([q.double()], [q]), TypeError, r"queries\[0\] must be float32, bfloat16 or float16"),
        (lambda q: roll_out_row([q], [q.half()]), TypeError, r"keys\[0\] must be torch.float32 like queries\[0\]"),
        (lambda q: roll_out_row([q], [q[:, :, 1:]]), ValueError, r"keys\[0\] must be \[2, 3, 5, 4\] like its queries"),
        (lambda q: roll_out_row([q, q[:1]], [q, q[:1]]), ValueError, r"queries\[1\] must be \[2, H, 5, d\]"),
        (lambda q: roll_out_row([q], [q], row=5), ValueError, "row must be one of the 5 tokens, got 5"),
        (lambda q: roll_out_row([q], [q], chunk=0), ValueError, "chunk must be at least 1, got 0"),
        (lambda q: GlobalLocalAttention(6, 2)(q[0], q), ValueError, r"x must be \[B, N, 6\], got \[3, 5, 4\]"),
        (lambda q: GlobalLocalAttention(6, 4), ValueError, "dim must be a multiple of heads = 4, got 6"),
        (
            lambda q: GlobalLocalAttention(4, 2)(q[0], q[0, :, :, 0]),
            ValueError,
            r"scores must be \[3, 4\], got \[3, 5\]",
        ),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 3, 5, 4))
