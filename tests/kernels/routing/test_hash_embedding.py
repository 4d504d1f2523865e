"""Hashed embeddings: the hash in unbounded integers, EmbeddingBag on hashed rows as oracle, the layer, messages."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.routing import HashEmbedding, embed_hashed
from planmill.kernels.routing.hash_embedding.reference import hash_rows, mix

DRAWS = 60
WORD = 2**64
LIMITS = torch.iinfo(torch.int64)
EDGES = [0, 1, -1, 2, LIMITS.min, LIMITS.min + 1, LIMITS.max, 2**31, 2**32, -(2**32), 2**63 - 2**31]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anything(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(LIMITS.min, LIMITS.max, shape, generator=generator(seed))


def whole_mix(z: int) -> int:
    """The finaliser in integers without bound."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(z: int) -> int:
    return z - WORD if z >= WORD // 2 else z


def test_the_mix_is_that_of_splitmix64() -> None:
    golden = signed(0x9E3779B97F4A7C15)
    assert int(mix(torch.tensor(golden))) == signed(0xE220A8397B1DCDAF), "first output of SplitMix64 from seed 0"
    for value in [*EDGES, *anything(200).tolist()]:
        assert int(mix(torch.tensor(value))) == signed(whole_mix(value % WORD))


@pytest.mark.parametrize("rows", [1, 2, 3, 1000, 2**16 + 1, 2**31 - 1])
def test_rows_are_those_of_unbounded_integers(rows: int) -> None:
    values = torch.tensor([*EDGES, *anything(50).tolist()])
    for seed in (0, -1, LIMITS.min, *anything(5, seed=1).tolist()):
        want = [whole_mix(whole_mix(v % WORD) ^ (seed % WORD)) * rows // WORD for v in values.tolist()]
        assert hash_rows(values, torch.tensor(seed), rows).tolist() == want
        assert all(0 <= row < rows for row in want)


@pytest.mark.parametrize("level", kernels.cpu_capabilities() or ("reference",))
@pytest.mark.parametrize("rows", [1, 7, 100_003])
def test_kernel_and_reference_hash_alike(level: str, rows: int) -> None:
    values = torch.tensor([*EDGES, *anything(500).tolist()])[:, None]
    table = torch.arange(rows, dtype=torch.float32)[:, None]  # exact below 2^24: the output is the row
    seeds = anything(3, seed=2)
    features = torch.zeros(3, dtype=torch.int32)
    want = hash_rows(values, seeds, rows)
    if level == "reference":
        assert torch.equal(embed_hashed(values, table, seeds, features).long(), want)
        return
    with kernels.cpu_capability(level):
        assert torch.equal(embed_hashed(values, table, seeds, features).long(), want)


def test_rows_are_even_and_lookups_independent() -> None:
    """Consecutive numbers, as vocabularies are: chi-square of the rows, and pairs of lookups that agree."""
    rows, values = 512, torch.arange(200_000)
    seeds = anything(4, seed=3)
    found = hash_rows(values[:, None], seeds, rows)
    for one in found.T:
        count = torch.bincount(one, minlength=rows).double()
        expected = len(values) / rows
        chi = float(((count - expected) ** 2 / expected).sum())
        assert abs(chi - (rows - 1)) < 6 * (2 * (rows - 1)) ** 0.5
    for i in range(4):
        for j in range(i):
            agree = int((found[:, i] == found[:, j]).sum())
            assert abs(agree - len(values) / rows) < 6 * (len(values) / rows) ** 0.5


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_agrees_with_embedding_bag(pooling: str, weighted: bool) -> None:
    """One EmbeddingBag (PyTorch, BSD-3) per lookup, over the values there are, on hashed rows."""
    batch, most, rows, width = 9, 5, 40, 12
    values, table = anything(batch, 3, most), torch.randn(rows, width, generator=generator(1))
    lengths = torch.randint(0, most + 1, (batch, 3), generator=generator(2)).int()
    weights = torch.rand(batch, 3, most, generator=generator(3))
    seeds, features = anything(5, seed=4), torch.tensor([0, 1, 1, 2, 2], dtype=torch.int32)
    parts = []
    for seed, f in zip(seeds, features.tolist(), strict=True):
        keep = torch.arange(most) < lengths[:, f, None]
        flat = hash_rows(values[:, f][keep], seed, rows)
        starts = lengths[:, f].cumsum(0) - lengths[:, f]
        bag = F.embedding_bag(
            flat, table, starts, mode="sum", per_sample_weights=weights[:, f][keep] if weighted else None
        )
        parts.append(bag / (lengths[:, f, None].clamp_min(1) if pooling == "mean" else 1))
    got = embed_hashed(
        values, table, seeds, features, lengths=lengths, weights=weights if weighted else None, pooling=pooling
    )
    torch.testing.assert_close(got, torch.cat(parts, 1), atol=1e-6, rtol=1e-5)


def test_one_value_is_a_copy_of_the_row() -> None:
    """Bits included: NaN payloads aside, nothing is computed."""
    table = torch.randn(50, 33, generator=generator()).to(torch.bfloat16)
    values, seeds = anything(20, 2), anything(2, seed=1)
    got = embed_hashed(values, table, seeds, torch.arange(2).int()).view(20, 2, 33)
    assert torch.equal(got, table[hash_rows(values, seeds, 50)])


def test_values_past_the_length_are_not_read() -> None:
    table, seeds, features = torch.randn(9, 4, generator=generator()), anything(1), torch.zeros(1, dtype=torch.int32)
    values, lengths = anything(6, 1, 3), torch.tensor([[0], [1], [2], [3], [7], [-2]], dtype=torch.int32)
    weights = torch.ones(6, 1, 3).masked_fill(torch.arange(3) >= lengths[..., None], torch.nan)
    got = embed_hashed(values, table, seeds, features, lengths=lengths, weights=weights)
    changed = values.masked_fill(torch.arange(3) >= lengths[..., None], 5)
    assert torch.equal(got, embed_hashed(changed, table, seeds, features, lengths=lengths))
    assert torch.equal(got[[0, 5]], torch.zeros(2, 4))
    assert got.isfinite().all()


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_gradient_of_the_table_without_weights(pooling: str) -> None:
    values, seeds = anything(7, 2, 3), anything(3, seed=1)
    features = torch.tensor([0, 1, 1], dtype=torch.int32)
    table = torch.randn(5, 4, generator=generator(2)).requires_grad_()
    weight = torch.randn(7, 12, generator=generator(3))
    (embed_hashed(values, table, seeds, features, pooling=pooling) * weight).sum().backward()
    again = table.detach().double().requires_grad_()
    found = again[hash_rows(values[:, features.long()], seeds[:, None], 5)]
    pooled = found.sum(2) if pooling == "sum" else found.mean(2)
    (pooled.flatten(1) * weight).sum().backward()
    assert table.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(table.grad.double(), again.grad, atol=1e-5, rtol=1e-5)


def test_layer() -> None:
    layer = HashEmbedding([1, 3, 2], rows=1000, width=8, seed=5)
    values = anything(10, 3)
    out = layer(values)
    assert out.shape == (10, 48)
    assert set(layer.state_dict()) == {"weight", "seeds"}
    which = torch.tensor([0, 1, 1, 1, 2, 2])
    want = layer.weight[hash_rows(values[:, which], layer.seeds, 1000)].flatten(1)
    assert torch.equal(out, want)
    assert abs(float(layer.weight.detach().std()) - 1) < 0.05
    assert torch.equal(HashEmbedding([1, 3, 2], 9, 4, seed=5).seeds, layer.seeds)
    assert not torch.equal(HashEmbedding([1, 3, 2], 9, 4, seed=6).seeds, layer.seeds)
    other = HashEmbedding([1, 3, 2], rows=1000, width=8, seed=6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(values), out)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.sum()) == out.numel()
    assert "features=(1, 3, 2), rows=1000, width=8" in repr(layer)


def test_layer_trains() -> None:
    """Two classes told apart by one feature among values never seen in a vocabulary."""
    layer, head = HashEmbedding([2, 2], rows=64, width=4, seed=1), torch.nn.Linear(16, 1)
    torch.nn.init.normal_(layer.weight, generator=generator())
    torch.nn.init.zeros_(head.weight)
    values = anything(2, 16)[torch.arange(2)[:, None], torch.randint(16, (2, 200), generator=generator(1))].T
    labels = (values[:, 0] > 0).float()
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(head(layer(values))[:, 0], labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


def test_layer_compiles_and_exports() -> None:
    layer = HashEmbedding([1, 2], rows=50, width=6, pooling="mean")
    values, lengths = anything(4, 2, 3), torch.tensor([[1, 2], [0, 3], [3, 3], [2, 0]], dtype=torch.int32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, lengths), layer(values, lengths))
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(layer, (values, lengths), dynamic_shapes=({0: batch}, {0: batch}))
    more, counts = anything(11, 2, 3, seed=1), torch.randint(0, 4, (11, 2), generator=generator()).int()
    torch.testing.assert_close(program.module()(more, counts), layer(more, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
def test_random_lookups(dtype: torch.dtype) -> None:
    spec = kernels.ops()["hash_embedding"]
    atol, rtol = spec.tolerances[dtype]
    for seed in range(DRAWS):
        g = generator(seed)

        def pick(*options: Any, g: torch.Generator = g) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=g))]

        batch, inputs, most = pick(1, 2, 65, 200), pick(1, 3, 8), pick(1, 1, 2, 5)
        lookups, rows, width = pick(1, 4, 65), pick(1, 2, 1000), pick(1, 3, 8, 31, 32, 33, 65, 200)
        lengths = torch.randint(-1, most + 2, (batch, inputs), generator=g).int()
        args = (
            anything(batch, inputs, most, seed=seed),
            lengths if pick(True, False) else lengths.flatten()[:0],
            torch.randn(batch, inputs, most, generator=g) if pick(True, False) else torch.empty(0),
            (torch.randn(rows, width, generator=g) * pick(1.0, 1e-3, 1e3)).to(dtype),
            anything(lookups, seed=seed + 1),
            torch.randint(inputs, (lookups,), generator=g).int(),
            pick(True, False),
        )
        scale = float(args[3].abs().max()) * most
        torch.testing.assert_close(spec.op(*args), spec.reference(*args), atol=atol * scale, rtol=rtol)


VALUES, TABLE, SEEDS, FEATURES = anything(4, 2), torch.ones(9, 3), anything(3), torch.tensor([0, 1, 1]).int()
MESSAGES = [
    ((VALUES.int(), TABLE, SEEDS, FEATURES), {}, TypeError, "values must be int64"),
    ((VALUES[0], TABLE, SEEDS, FEATURES), {}, ValueError, r"values must be \[B, F\] or \[B, F, L\]"),
    ((VALUES, TABLE[0], SEEDS, FEATURES), {}, ValueError, r"table must be \[M, d\]"),
    ((VALUES, TABLE[:0], SEEDS, FEATURES), {}, ValueError, "table must have from 1 to"),
    ((VALUES, TABLE.double(), SEEDS, FEATURES), {}, TypeError, "table must be float32"),
    ((VALUES, TABLE, SEEDS.int(), FEATURES), {}, TypeError, "seeds must be int64"),
    ((VALUES, TABLE, SEEDS, FEATURES.long()), {}, TypeError, "features must be int32"),
    ((VALUES, TABLE, SEEDS, FEATURES[:2]), {}, ValueError, r"features must be \[3\] like seeds"),
    ((VALUES[:1].expand(2**30, 2), TABLE, SEEDS, FEATURES), {}, ValueError, "fewer than 2\\^31 lookups"),
    ((VALUES, TABLE, SEEDS, FEATURES + 1), {}, ValueError, "features must be from 0 to 1, got 1 to 2"),
    ((VALUES, TABLE, SEEDS, FEATURES), {"pooling": "max"}, ValueError, "pooling must be one of sum, mean"),
    ((VALUES, TABLE, SEEDS, FEATURES), {"lengths": FEATURES}, ValueError, r"lengths must be \[B, F\]"),
    ((VALUES, TABLE, SEEDS, FEATURES), {"lengths": VALUES}, TypeError, "lengths must be int32"),
    ((VALUES, TABLE, SEEDS, FEATURES), {"lengths": VALUES.int()[:3]}, ValueError, r"lengths must be \[4, 2\]"),
    ((VALUES, TABLE, SEEDS, FEATURES), {"weights": torch.ones(4, 3)}, ValueError, r"weights must be \[4, 2, 1\]"),
    ((VALUES, TABLE, SEEDS, FEATURES), {"weights": torch.ones(4, 2).half()}, TypeError, "weights must be float32"),
    ((VALUES, TABLE.to("meta"), SEEDS, FEATURES), {}, ValueError, "values must be on meta like table"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "message"), MESSAGES, ids=[m[3] for m in MESSAGES])
def test_messages(args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embed_hashed(*args, **options)


@pytest.mark.parametrize("arguments", [([], 5, 5), ([0, 1], 5, 5), ([1], 0, 5), ([1], 5, 0)], ids=str)
def test_the_layer_checks_its_sizes(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="HashEmbedding: features, rows and width must be positive"):
        HashEmbedding(*arguments)
