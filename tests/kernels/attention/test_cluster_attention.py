"""Attention in clusters: ties, random draws against the definitions, samples alone and in a batch, messages."""

from typing import Any

import pytest
import torch

from planmill import kernels
from planmill.kernels.attention import attend_in_clusters, choose_members
from planmill.kernels.attention.cluster_attention.cases import any_members


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Draw:
    """Choices and data of one seed."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def pick(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=self.g))]

    def data(self, *shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=self.g) * self.pick(1.0, 1.0, 1.0, 1e-20, 3.0) + self.pick(0, 0, 5.0)
        if self.pick(0, 0, 0, 1):
            x = x.round()
        if self.pick(0, 0, 0, 0, 1) and x.numel():
            hit = torch.rand(shape[:-1], generator=self.g) < self.pick(0.05, 0.9)
            x[hit] = self.pick(torch.nan, torch.inf, -torch.inf)
        return x

    def mask(self, *shape: int) -> torch.Tensor:
        if self.pick(0, 1):
            return torch.empty(0, dtype=torch.bool)
        return torch.rand(*shape, generator=self.g) < self.pick(0.0, 0.3, 0.9)


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_random_attention(level: str) -> None:
    """Random sizes, kinds of data, masks, memories and members, ordered or not."""
    spec = kernels.ops()["cluster_attention"]
    for seed in range(80):
        draw = Draw(seed)
        batch, heads, clusters = draw.pick(1, 2), draw.pick(1, 3), draw.pick(1, 2, 5)
        tokens, width = draw.pick(1, 2, 7, 16, 33, 130), draw.pick(1, 3, 8, 17, 64)
        shared, causal = draw.pick(False, True), draw.pick(False, True)
        k_tokens = tokens if shared else draw.pick(tokens, tokens, 5, 0)
        window = min(tokens, draw.pick(1, 2, 6, 24, 25, 97, 128))
        q = draw.data(batch, heads, tokens, width)
        k = q if shared else draw.data(batch, heads, k_tokens, width)
        v = normal(batch, heads, k_tokens, draw.pick(1, width, 21), seed=seed)
        q_members = any_members(draw.g, batch, heads, tokens, clusters, window)
        k_members = any_members(draw.g, batch, heads, k_tokens, clusters, min(k_tokens, draw.pick(1, 7, 65)))
        if draw.pick(0, 1):
            q_members, k_members = q_members.flip(-1), k_members.flip(-1)
        memory = draw.pick(0, 0, 1, 3)
        memories = [draw.data(heads, clusters, memory, width), normal(heads, clusters, memory, v.shape[3], seed=seed)]
        masks = draw.mask(batch, tokens), draw.mask(batch, k_tokens)
        members = q_members, q_members if shared else k_members
        args = (q, k, v, *members, *memories, *masks, draw.pick(0.1, 1.0), causal, shared)
        with kernels.cpu_capability(level):
            got = spec.op(*args)
        print(f"seed {seed}")  # shown by pytest where the comparison fails
        torch.testing.assert_close(got, spec.reference(*args), atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_random_members(level: str) -> None:
    spec = kernels.ops()["cluster_members"]
    for seed in range(80):
        draw = Draw(seed)
        tokens, width = draw.pick(1, 2, 63, 64, 65, 700), draw.pick(1, 2, 7, 16, 33)
        heads, clusters = draw.pick(1, 3), draw.pick(1, 2, 15, 16, 17, 70)
        x, window = draw.data(draw.pick(1, 2), heads, tokens, width), min(tokens, draw.pick(1, 3, 40, 64, 500))
        args = (x, normal(heads, clusters, width, seed=seed) * draw.pick(0.1, 1.0), window)
        print(f"seed {seed}")
        with kernels.cpu_capability(level):
            got = spec.op(*args)
        assert spec.compare is not None
        spec.compare(args, (got,), (spec.reference(*args),), 0.0, 0.0)


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_of_equal_tokens_the_first_are_members(level: str) -> None:
    """Copies of few rows: their scores are equal to the bit, and many of them stand at the edge of a cluster."""
    few, where = normal(5, 12), torch.randint(5, (2, 3, 400), generator=torch.Generator().manual_seed(1))
    x, centroids = few[where], normal(3, 20, 12, seed=2)
    x[1, 1] = torch.nan
    with kernels.cpu_capability(level):
        assert torch.equal(
            choose_members(x, centroids, 64), kernels.ops()["cluster_members"].reference(x, centroids, 64)
        )


@pytest.mark.usefixtures("two_threads")
def test_a_sample_alone_is_the_sample_in_a_batch() -> None:
    q, k, v = (normal(5, 2, 90, 20, seed=seed) for seed in range(3))
    centroids = normal(2, 6, 20, seed=4)
    mask = torch.rand(5, 90, generator=torch.Generator().manual_seed(5)) < 0.8

    def run(part: slice) -> torch.Tensor:
        members = [choose_members(x[part], centroids, 16) for x in (q, k)]
        masks = {"q_mask": mask[part], "k_mask": mask[part]}
        return attend_in_clusters(q[part], k[part], v[part], *members, causal=True, **masks)

    together = run(slice(None))
    assert torch.equal(together[3:4], run(slice(3, 4)))
    torch.set_num_threads(1)
    assert torch.equal(together, run(slice(None)))


def test_window_past_the_tokens() -> None:
    """Every cluster then holds all tokens, and the result is that of plain attention but for 1e-5 in the mean."""
    q, k, v = (normal(1, 2, 11, 8, seed=seed) for seed in range(3))
    members = choose_members(q, normal(2, 4, 8), 64)
    assert torch.equal(members, torch.arange(11, dtype=torch.int32).expand(1, 2, 4, 11))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    got = attend_in_clusters(q, k, v, members, members)
    torch.testing.assert_close(got * (4 + 1e-5) / 4, plain, atol=1e-6, rtol=1e-5)


def test_long_sequences_take_linear_memory() -> None:
    """65536 tokens: an N x N matrix would be 16 GiB; parts of the result are compared with the definition."""
    tokens, window = 65536, 64
    q, k, v = (normal(1, 1, tokens, 8, seed=seed) for seed in range(3))
    centroids = normal(1, 32, 8, seed=4)
    q_members, k_members = (choose_members(x, centroids, window) for x in (q, k))
    got = attend_in_clusters(q, k, v, q_members, k_members, causal=True)
    spec = kernels.ops()["cluster_attention"]
    none, no_mask = torch.empty(1, 32, 0, 8), torch.empty(0, dtype=torch.bool)
    want = spec.reference(q, k, v, q_members, k_members, none, none, no_mask, no_mask, 8**-0.5, True, False)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


MEMBERS = torch.zeros(2, 3, 4, 2, dtype=torch.int32)


def test_heads_too_wide_for_the_gpu_kernel() -> None:
    """The launcher runs the definition, before it needs a GPU, and says so in `which`, as `cuda_limit` has it."""
    spec = kernels.ops()["cluster_attention"]
    q, members = normal(1, 1, 9, 257), torch.tensor([[[[0, 3, 8], [1, 3, 5]]]], dtype=torch.int32)
    memory, mask = q.new_empty(1, 2, 0, 257), torch.empty(0, dtype=torch.bool)
    args = (q, q, q, members, members, memory, memory, mask, mask, 0.1, True, False)
    assert torch.equal(spec.load(str(spec.cuda))(*args), spec.reference(*args))
    assert spec.cuda_limit == "heads of more than 256 channels"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, c: choose_members(x[0], c, 4),
            ValueError,
            r"cluster_members: x must be \[B, H, N, d\], got \[3, 9, 6",
        ),
        (lambda x, c: choose_members(x.double(), c, 4), TypeError, "x must be float32, bfloat16 or float16, got"),
        (
            lambda x, c: choose_members(x, c[:2], 4),
            ValueError,
            r"centroids must be \[3, C, 6\] like x, got \[2, 4, 6\]",
        ),
        (lambda x, c: choose_members(x, c, 0), ValueError, "window must be at least 1, got 0"),
        (
            lambda x, c: attend_in_clusters(x, x.half(), x, MEMBERS, MEMBERS),
            TypeError,
            "k must be torch.float32 like q",
        ),
        (
            lambda x, c: attend_in_clusters(x, x[:1], x, MEMBERS, MEMBERS),
            ValueError,
            r"k must be \[2, 3, Nk, 6\] like q",
        ),
        (
            lambda x, c: attend_in_clusters(x, x, x[:, :, 1:], MEMBERS, MEMBERS),
            ValueError,
            r"v must be \[2, 3, 9, dv\]",
        ),
        (lambda x, c: attend_in_clusters(x, x, x, MEMBERS), ValueError, "k_members must be given without shared_qk"),
        (lambda x, c: attend_in_clusters(x, x, x, MEMBERS.long(), MEMBERS), TypeError, "q_members must be int32"),
        (
            lambda x, c: attend_in_clusters(x, x, x, MEMBERS, MEMBERS[:1]),
            ValueError,
            r"k_members must be \[2, 3, 4, w\]",
        ),
        (
            lambda x, c: attend_in_clusters(x, x, x, MEMBERS, MEMBERS - 1),
            ValueError,
            "k_members must be from 0 to 8, got -1",
        ),
        (
            lambda x, c: attend_in_clusters(x, x, x, MEMBERS + 9, MEMBERS),
            ValueError,
            "q_members must be from 0 to 8, got 9",
        ),
        (
            lambda x, c: attend_in_clusters(x, x, x, MEMBERS, MEMBERS, memory_k=c[:, :, None]),
            ValueError,
            "memory_k and memory_v must be given together",
        ),
        (
            lambda x, c: attend_in_clusters(x, x, x, MEMBERS, MEMBERS, memory_k=c[:, :, None], memory_v=c[:, :1, None]),
            ValueError,
            r"memory_v must be \[3, 4, m, 6\], got \[3, 1, 1, 6\]",
        ),
        (
            lambda x, c: attend_in_clusters(x, x, x, MEMBERS, MEMBERS, q_mask=torch.ones(2, 8, dtype=torch.bool)),
            ValueError,
            r"q_mask must be \[2, 9\], got \[2, 8\]",
        ),
        (
            lambda x, c: attend_in_clusters(x, x[:, :, 1:], x[:, :, 1:], MEMBERS, shared_qk=True),
            ValueError,
            r"k must be \[2, 3, 9, 6\] like q with shared_qk, got \[2, 3, 8, 6\]",
        ),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 3, 9, 6), normal(3, 4, 6))
