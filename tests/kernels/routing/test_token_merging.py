"""Token merging: the published procedure restated as loops, promises of the docstrings, random inputs, messages."""

from typing import Any

import pytest
import timm
import torch

from planmill import kernels
from planmill.kernels.routing import MergePlan, TokenPartition, match_tokens, merge_tokens, unmerge_tokens

DRAWS = 40
WIDTHS = (1, 2, 3, 7, 16, 31, 33, 64, 129, 257)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def looped_merge(
    m: torch.Tensor, x: torch.Tensor, src: list[int], dst: list[int], protected: list[int], merges: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The published procedure, one token at a time: merged rows and the unmerged result of one entry; float64."""
    m, x = m.double(), x.double()
    unit = m / m.norm(dim=1, keepdim=True)
    matches = []
    for s in src:
        similarity = [float(unit[s] @ unit[d]) for d in dst]
        best = max(range(len(dst)), key=lambda j: (similarity[j], -j))
        matches.append((similarity[best], s, best))
    matches.sort(key=lambda match: (-match[0], match[1]))
    groups = [[d] for d in dst]
    for _, s, best in matches[:merges]:
        groups[best].append(s)
    unmerged = [s for _, s, _ in matches[merges:]]
    rows = [x[s] for s in unmerged] + [x[group].mean(0) for group in groups] + [x[p] for p in protected]
    out = torch.full_like(x, torch.nan)
    for row, s in zip(rows, unmerged, strict=False):
        out[s] = row
    for row, group in zip(rows[len(unmerged) :], groups, strict=False):
        out[group] = row
    for p in protected:
        out[p] = x[p]
    return torch.stack(rows), out


FRAMES = [(3, 5, 7), (4, 4, 6), (2, 3, 3), (1, 4, 4), (2, 1, 5)]


@pytest.mark.parametrize("size", FRAMES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0], ids=["all", "some", "none"])
def test_published_procedure(size: tuple[int, int, int], share: float) -> None:
    made = TokenPartition.for_frames(*size)
    merges = int(share * made.src.numel())
    m, x = normal(2, made.tokens, 24), normal(2, made.tokens, 10, seed=1)
    plan = match_tokens(m, made, merges)
    merged = merge_tokens(x, plan)
    back = unmerge_tokens(merged, plan)
    lists = (made.src.tolist(), made.dst.tolist(), made.protected.tolist())
    for entry in range(2):
        rows, out = looped_merge(m[entry], x[entry], *lists, merges)
        torch.testing.assert_close(merged[entry].double(), rows, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(back[entry].double(), out, atol=1e-6, rtol=1e-5)


def tome(x: torch.Tensor, metric: torch.Tensor, size: torch.Tensor, merges: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe (Bolya et al., ICLR 2023) restated for one entry with a class token: weighted rows, and new sizes."""
    unit = metric / metric.norm(dim=1, keepdim=True)
    similarity, target = (unit[2::2] @ unit[1::2].T).max(1)
    order = similarity.argsort(descending=True)
    total, sizes = (x * size)[1::2].clone(), size[1::2].clone()
    for s in order[:merges]:
        total[target[s]] += (x * size)[2::2][s]
        sizes[target[s]] += size[2::2][s]
    rest = order[merges:].sort().values
    rows = torch.cat([(x * size)[:1], (x * size)[2::2][rest], total])
    sizes = torch.cat([size[:1], size[2::2][rest], sizes])
    return rows / sizes, sizes


@pytest.mark.parametrize("tokens", [197, 66])
def test_bipartite_soft_matching(tokens: int) -> None:
    """Three layers in which the tokens shrink, as in a ViT with merging."""
    x, size = normal(2, tokens, 32), torch.ones(2, tokens, 1)
    want = [(entry, torch.ones(tokens, 1)) for entry in x]
    for merges in (8, 8, 5):
        metric = x[..., :16] + 0.1
        plan = match_tokens(metric, TokenPartition.alternating(x.shape[1]), merges)
        total, size = (merge_tokens(part, plan, "sum") for part in (x * size, size))
        want = [tome(*pair, merges) for pair in ((a, a[:, :16] + 0.1, b) for a, b in want)]
        x = total / size
        for entry in range(2):
            torch.testing.assert_close(x[entry], want[entry][0], atol=1e-5, rtol=1e-5)
            assert torch.equal(size[entry], want[entry][1])
    assert x.shape == (2, tokens - 21, 32)


def features_with_merging(model: Any, images: torch.Tensor, merges: tuple[int, ...]) -> torch.Tensor:
    """A ViT of timm (Apache-2.0) with ToMe in every block: keys as metric, attention in proportion to the sizes."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones(*x.shape[:2], 1)
    for block, count in zip(model.blocks, merges, strict=True):
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = size.log().view(len(x), 1, 1, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        plan = match_tokens(k.mean(1), TokenPartition.alternating(x.shape[1]), count)
        total, size = (merge_tokens(part, plan, "sum") for part in (x * size, size))
        x = total / size
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


def test_merging_in_a_vision_transformer() -> None:
    """Without merges nothing changes; equal tokens merge without loss, since attention knows how many they were."""
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3, num_classes=0).eval()
    with torch.no_grad():
        images = normal(2, 3, 96, 96)
        same = features_with_merging(model, images, (0, 0, 0))
        torch.testing.assert_close(same[:, 0], model.forward_features(images)[:, 0], atol=1e-4, rtol=1e-4)
        model.pos_embed.zero_()
        constant = normal(2, 3, 1, 1).expand(-1, -1, 96, 96)
        merged = features_with_merging(model, constant, (18, 9, 4))
        assert merged.shape == (2, 37 - 18 - 9 - 4, 192)
        torch.testing.assert_close(merged[:, 0], model.forward_features(constant)[:, 0], atol=1e-4, rtol=1e-4)


def test_alternating_partition_of_one_and_two_tokens() -> None:
    for class_token in (True, False):
        alone = TokenPartition.alternating(1, class_token=class_token)
        plan = match_tokens(normal(1, 1, 4), alone)
        assert torch.equal(merge_tokens(normal(1, 1, 4), plan), normal(1, 1, 4))
        pair = TokenPartition.alternating(2, class_token=class_token)
        assert match_tokens(normal(1, 2, 4), pair).rows == (2 if class_token else 1)


def test_each_entry_of_a_batch_has_its_own_plan() -> None:
    made = TokenPartition.for_frames(2, 5, 5)
    m, x = normal(3, made.tokens, 40), normal(3, made.tokens, 12, seed=1)
    plan = match_tokens(m, made, 9)
    for i in range(3):
        alone = match_tokens(m[i : i + 1], made, 9)
        for whole, one in zip(plan, alone, strict=True):
            assert torch.equal(whole[i : i + 1], one)
        assert torch.equal(merge_tokens(x, plan)[i : i + 1], merge_tokens(x[i : i + 1], alone))
    assert not torch.equal(plan.row_of_token[0], plan.row_of_token[1])


def test_protected_destinations_appear_twice() -> None:
    made = TokenPartition.for_frames(2, 4, 4)
    both = made.dst[torch.isin(made.dst, made.protected)]
    assert both.numel() > 0
    x = normal(1, made.tokens, 6)
    plan = match_tokens(x, made)
    listed = plan.members[0].tolist()
    assert all(listed.count(t) == 2 for t in both.tolist())
    back = unmerge_tokens(merge_tokens(x, plan), plan)
    assert torch.equal(back[:, made.protected.long()], x[:, made.protected.long()])


def test_merging_keeps_sums_and_constants() -> None:
    made = TokenPartition.for_frames(3, 5, 7, protect=0)
    x = normal(2, made.tokens, 16)
    plan = match_tokens(x, made, 30)
    total = merge_tokens(x, plan, "sum").double().sum(1)
    torch.testing.assert_close(total, x.double().sum(1), atol=1e-5, rtol=1e-5)
    constant = torch.full_like(x, 3.25)
    assert torch.equal(unmerge_tokens(merge_tokens(constant, plan), plan), constant)
    assert int((plan.offsets[:, 1:] - plan.offsets[:, :-1]).sum()) == 2 * made.tokens
    assert torch.equal(plan.members.sort(1).values, torch.arange(made.tokens).int().expand(2, -1)), "a permutation"


def test_nothing_merged_is_only_another_order() -> None:
    made = TokenPartition.alternating(20)
    x = normal(2, 20, 8)
    plan = match_tokens(x, made, 0)
    assert plan.rows == 20
    assert torch.equal(unmerge_tokens(merge_tokens(x, plan), plan), x)


def test_ties_merge_the_lower_source_first() -> None:
    x = torch.ones(1, 12, 4)
    plan = match_tokens(x, TokenPartition.alternating(12, class_token=False), 2)
    assert plan.members[0].tolist() == [4, 6, 8, 10, 1, 0, 2, 3, 5, 7, 9, 11]
    published = TokenPartition.for_frames(2, 2, 2, special=0, protect=0)
    plan = match_tokens(torch.ones(1, 8, 4), published, 1)
    assert plan.row_of_token[0, published.src.long()].tolist() == [2, 0, 1]


def test_what_cannot_be_matched_is_merged_last() -> None:
    x = normal(1, 11, 4)
    x[0, 4, 1] = torch.nan
    made = TokenPartition.alternating(11)
    plan = match_tokens(x, made, 4)
    merged = merge_tokens(x, plan)
    assert merged[0, 1].isnan().any(), "token 4 is the only unmerged source"
    assert int(merged.isnan().any(2).sum()) == 1
    everything = merge_tokens(x, match_tokens(x, made))
    assert everything[0].isnan().any(1).nonzero().flatten().tolist() == [1], "the first destination"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
def test_large_match_agrees_with_a_matrix_product(dtype: torch.dtype) -> None:
    made = TokenPartition.for_frames(3, 14, 17)
    centers = torch.nn.functional.normalize(normal(8, 96), dim=1)
    m = (centers[torch.arange(made.tokens) % 8] + 0.3 * normal(1, made.tokens, 96, seed=1)).to(dtype)
    similarity, position = torch.ops.planmill.token_matching(m, made.src, made.dst)
    unit = torch.nn.functional.normalize(m.double(), dim=2)[0]
    scores = unit[made.src.long()] @ unit[made.dst.long()].T
    torch.testing.assert_close(similarity[0].double(), scores.max(1).values, atol=1e-6, rtol=0)
    assert torch.equal(position[0].long(), scores.argmax(1))


class Step(torch.nn.Module):
    """Merge, something, unmerge, as a block of attention has it."""

    def __init__(self, partition: TokenPartition, merges: int | None) -> None:
        super().__init__()
        self.partition, self.merges = partition, merges

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = match_tokens(x, self.partition, self.merges)
        return unmerge_tokens(torch.tanh(merge_tokens(x, plan)), plan, residual=x)


@pytest.mark.parametrize("merges", [None, 7], ids=["all", "some"])
def test_step_compiles_and_exports(merges: int | None) -> None:
    step = Step(TokenPartition.for_frames(2, 3, 5), merges)
    x = normal(2, step.partition.tokens, 12)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))
    program = torch.export.export(step, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    other = normal(5, step.partition.tokens, 12, seed=3)
    torch.testing.assert_close(program.module()(other), step(other))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_through_merge_and_unmerge(reduction: str) -> None:
    made = TokenPartition.for_frames(2, 3, 5)
    x = normal(2, made.tokens, 6).requires_grad_()
    plan = match_tokens(x, made, 9)
    weight = normal(2, made.tokens, 6, seed=2)
    (unmerge_tokens(merge_tokens(x, plan, reduction), plan) * weight).sum().backward()
    matrix = torch.zeros(2, plan.rows, made.tokens, dtype=torch.float64)
    for b in range(2):
        for i in range(plan.rows):
            own = plan.members[b, plan.offsets[b, i] : plan.offsets[b, i + 1]].long()
            matrix[b, i, own] = 1 / len(own) if reduction == "mean" else 1.0
    whole = torch.stack([matrix[b, plan.row_of_token[b].long()] for b in range(2)])
    want = whole.mT @ weight.double()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), want, atol=1e-5, rtol=1e-5)
    assert all(not part.is_floating_point() for part in plan), "the plan carries no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_residual_and_scale_in_the_same_pass(dtype: torch.dtype) -> None:
    made = TokenPartition.for_frames(2, 3, 5)
    x, gamma = normal(2, made.tokens, 33).to(dtype), normal(33, seed=1).to(dtype)
    plan = match_tokens(x, made, 9)
    y = merge_tokens(x, plan)
    plain = unmerge_tokens(y, plan)
    assert torch.equal(plain, torch.stack([y[b, plan.row_of_token[b].long()] for b in range(2)]))
    want = (x.double() + gamma.double() * plain.double()).to(dtype)
    torch.testing.assert_close(unmerge_tokens(y, plan, x, gamma), want)
    torch.testing.assert_close(unmerge_tokens(y, plan, x), (x.double() + plain.double()).to(dtype))
    torch.testing.assert_close(unmerge_tokens(y, plan, scale=gamma), (gamma.double() * plain.double()).to(dtype))


def test_gradient_of_residual_and_scale() -> None:
    plan = plan_of()
    y, x, gamma = (normal(*shape, seed=4).requires_grad_() for shape in ((2, plan.rows, 4), (2, 9, 4), (4,)))
    weight = normal(2, 9, 4, seed=5)
    (unmerge_tokens(y, plan, x, gamma) * weight).sum().backward()
    got = [t.grad for t in (y, x, gamma)]
    again = [t.detach().double().requires_grad_() for t in (y, x, gamma)]
    picked = torch.stack([again[0][b, plan.row_of_token[b].long()] for b in range(2)])
    ((again[1] + again[2] * picked) * weight).sum().backward()
    for mine, theirs in zip(got, again, strict=True):
        assert mine is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.double(), theirs.grad, atol=1e-5, rtol=1e-5)


def draw_rows(g: torch.Generator, batch: int, tokens: int, width: int) -> torch.Tensor:
    """Rows of a random kind; now and then with NaN or infinity in some of them."""
    x = torch.randn(batch, tokens, width, generator=g)
    kind = int(torch.randint(10, (1,), generator=g))
    made = [
        x,
        x.round(),
        x + 100,
        x[:, :1].expand(-1, tokens, -1).clone(),
        x[..., :1] * torch.randn(width, generator=g),
        x * 1e25,
        x * 1e-25,
        x * 10 ** (3 * torch.randn(batch, tokens, 1, generator=g)),
        x * (torch.rand(batch, tokens, 1, generator=g) > 0.5),
        x[:, :1] + 1e-4 * x,
    ][kind]
    if int(torch.randint(6, (1,), generator=g)) == 0:
        rows = made.view(-1, width)
        hit = torch.randint(len(rows), (max(1, len(rows) // 20),), generator=g)
        rows[hit, 0] = (torch.nan, torch.inf, -torch.inf)[int(torch.randint(3, (1,), generator=g))]
    return made


def pick(g: torch.Generator, *options: Any) -> Any:
    return options[int(torch.randint(len(options), (1,), generator=g))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_matches(dtype: torch.dtype) -> None:
    spec = kernels.ops()["token_matching"]
    assert spec.compare is not None
    for seed in range(DRAWS):
        g = torch.Generator().manual_seed(seed)
        tokens = pick(g, 2, 5, 33, 97, 130, 400)
        x = draw_rows(g, pick(g, 1, 2, 3), tokens, pick(g, *WIDTHS)).to(dtype)
        order = torch.randperm(tokens, generator=g).int()
        cut = pick(g, 1, tokens // 2, tokens - 1)
        args = (x, order[:cut].sort().values, order[cut:].sort().values)
        print(f"seed {seed}: {tuple(x.shape)}")  # shown by pytest where the comparison fails
        spec.compare(args, spec.op(*args), spec.reference(*args), 2e-6, 0)


def test_random_merges() -> None:
    for seed in range(DRAWS):
        g = torch.Generator().manual_seed(seed)
        frames, height, width = pick(g, 1, 2, 3), pick(g, 1, 2, 5), pick(g, 1, 3, 4)
        made = TokenPartition.for_frames(
            frames, height, width, special=pick(g, 0, 1, 5), seed=pick(g, 33, 4, None), protect=pick(g, 0.0, 0.1, 0.5),
            sheared=pick(g, True, False),
        )  # fmt: skip
        batch = pick(g, 1, 3)
        x = draw_rows(g, batch, made.tokens, pick(g, *WIDTHS))
        plan = match_tokens(x, made, pick(g, None, 0, 1, made.src.numel() // 2))
        merged = merge_tokens(x, plan)
        args = (x, plan.offsets, plan.members, True)
        scale = float(x.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(
            merged, kernels.ops()["token_merging"].reference(*args), atol=1e-5 * scale, rtol=1e-5, equal_nan=True
        )
        for b in range(batch):  # every token is in the list of the row that stands for it
            sizes = plan.offsets[b].diff()
            row = torch.arange(plan.rows).repeat_interleave(sizes)
            held = set(zip(plan.members[b].tolist(), row.tolist(), strict=True))
            assert all(pair in held for pair in enumerate(plan.row_of_token[b].tolist()))


def nine() -> TokenPartition:
    return TokenPartition.alternating(9)


def plan_of() -> MergePlan:
    return match_tokens(normal(2, 9, 4), nine())


MESSAGES = [
    (lambda: match_tokens(normal(9, 4), nine()), ValueError, r"metric must be \[B, N, C\]"),
    (lambda: match_tokens(normal(1, 8, 4), nine()), ValueError, "the partition's 9 tokens"),
    (lambda: match_tokens(normal(1, 9, 4).double(), nine()), TypeError, "metric must be float32"),
    (lambda: match_tokens(normal(1, 9, 4), nine(), -1), ValueError, "merges must not be negative"),
    (lambda: match_tokens(normal(1, 9, 4).to("meta"), nine()), ValueError, "partition must be on"),
    (lambda: merge_tokens(normal(2, 8, 4), plan_of()), ValueError, r"x must be \[2, 9, C\]"),
    (lambda: merge_tokens(normal(1, 9, 4), plan_of()), ValueError, r"x must be \[2, 9, C\]"),
    (lambda: merge_tokens(normal(2, 9, 4).to("meta"), plan_of()), ValueError, "the plan must be on meta"),
    (lambda: merge_tokens(normal(9, 4), plan_of()), ValueError, r"x must be \[B, N, C\]"),
    (lambda: merge_tokens(normal(2, 9, 4).int(), plan_of()), TypeError, "x must be float32"),
    (lambda: merge_tokens(normal(2, 9, 4), plan_of(), "max"), ValueError, "reduction must be one of mean, sum"),
    (lambda: unmerge_tokens(normal(2, 9, 4), plan_of()), ValueError, r"y must be \[2, 5, C\]"),
    (lambda: unmerge_tokens(normal(2, 5, 4), plan_of(), normal(2, 8, 4)), ValueError, r"residual must be \[2, 9, C\]"),
    (
        lambda: unmerge_tokens(normal(2, 5, 4), plan_of(), normal(2, 9, 3)),
        ValueError,
        "residual must have the 4 channels",
    ),
    (
        lambda: unmerge_tokens(normal(2, 5, 4), plan_of(), normal(2, 9, 4).half()),
        TypeError,
        "residual must be torch.float32",
    ),
    (lambda: unmerge_tokens(normal(2, 5, 4), plan_of(), scale=normal(3)), ValueError, r"scale must be \[4\] on cpu"),
    (
        lambda: unmerge_tokens(normal(2, 5, 4), plan_of(), scale=torch.ones(4).int()),
        TypeError,
        "scale must be floating",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), MESSAGES, ids=[m[2] for m in MESSAGES])
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
