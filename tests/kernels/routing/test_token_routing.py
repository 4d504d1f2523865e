"""token_routing: the published formulas, each flag, capacity by hand, every message, gradients, random inputs."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels import cpu_capabilities, cpu_capability, ops
from planmill.kernels.routing import expert_capacity, route_tokens
from planmill.kernels.routing.token_routing.cases import compare
from planmill.kernels.routing.token_routing.reference import within_capacity

SPEC = ops()["token_routing"]
LEVELS = cpu_capabilities() or ("reference",)


def logits(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def assert_routing(got: tuple, indices: torch.Tensor, weights: torch.Tensor) -> None:
    assert torch.equal(got[0], indices.int())
    torch.testing.assert_close(got[1], weights.float(), atol=1e-6, rtol=1e-5)


def test_softmax_over_all_experts(generator: torch.Generator) -> None:
    x = logits(generator, 50, 9)
    top = x.softmax(1).topk(3)
    assert_routing(route_tokens(x, 3), top.indices, top.values)
    assert_routing(route_tokens(x, 3, scale=2.0), top.indices, 2 * top.values)
    shares = top.values / (top.values.sum(1, keepdim=True) + 0.25)
    assert_routing(route_tokens(x, 3, renormalize=True, eps=0.25), top.indices, shares)


def test_renormalized_softmax_is_the_softmax_of_the_chosen(generator: torch.Generator) -> None:
    x = logits(generator, 50, 9)
    top = x.topk(4)
    for found in (route_tokens(x, 4, renormalize=True), route_tokens(x, 4, order="topk_then_softmax")):
        assert_routing(found, top.indices, top.values.softmax(1))


def test_top_1_sigmoid_of_the_chosen_logit(generator: torch.Generator) -> None:
    x = logits(generator, 20, 16)
    top = x.topk(1)
    assert_routing(route_tokens(x, 1, score="sigmoid"), top.indices, top.values.sigmoid())


@pytest.mark.parametrize("mask", [-torch.inf, 0.0])
def test_groups_with_a_bias_as_published(generator: torch.Generator, mask: float) -> None:
    """The group-limited choice, restated: two largest of a group, best groups, best experts of those."""
    x, bias = logits(generator, 40, 24), torch.randn(24, generator=generator) - 1.5
    p = x.sigmoid()
    q = p + bias
    best = q.view(40, 6, 4).topk(2).values.sum(2).topk(3).indices
    shut = torch.ones(40, 6, dtype=torch.bool).scatter(1, best, False).repeat_interleave(4, 1)
    chosen = q.masked_fill(shut, mask).topk(5).indices
    a = p.gather(1, chosen)
    a = 2.5 * a / (a.sum(1, keepdim=True) + 1e-20)
    found = route_tokens(
        x, 5, score="sigmoid", renormalize=True, eps=1e-20, scale=2.5, bias=bias, groups=6, top_groups=3,
        group_mask_value=mask,
    )  # fmt: skip
    outside = shut.gather(1, found[0].long())
    if mask == 0.0:  # masked experts tie at 0, above negative offers: the lowest of them are chosen, after the positive
        assert bool(outside.any()), "the trap is not in the data"
        chosen = q.masked_fill(shut, mask).argsort(dim=1, descending=True, stable=True)[:, :5]
        a = p.gather(1, chosen)
        a = 2.5 * a / (a.sum(1, keepdim=True) + 1e-20)
    else:
        assert not bool(outside.any())
    assert_routing(found, chosen, a)


def test_bias_changes_the_choice_and_not_the_weight() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    found = route_tokens(x, 1, bias=torch.tensor([5.0, 0.0, 0.0]))
    assert_routing(found, torch.tensor([[0]]), x.softmax(1)[:, :1])


@pytest.mark.parametrize("level", LEVELS)
def test_ties_go_to_the_lower_index(level: str) -> None:
    x = torch.zeros(3, 70)
    x[1, 65], x[2, 3:69:5] = 1.0, 2.0
    with cpu_capability(level):
        found = route_tokens(x, 3)[0]
    assert found.tolist() == [[0, 1, 2], [65, 0, 1], [3, 8, 13]]


@pytest.mark.parametrize("options", [{}, {"renormalize": True}, {"score": "sigmoid"}, {"order": "topk_then_softmax"}])
def test_nan_is_never_chosen_before_a_number(options: dict[str, Any]) -> None:
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[nan, 1.0, 0.0, 2.0], [nan, nan, -3.0, nan], [nan] * 4, [nan, -inf, -inf, nan]])
    indices, weights = route_tokens(x, 2, **options)
    assert indices.tolist() == [[3, 1], [2, 0], [0, 1], [0, 1]]
    assert bool(weights[:2].isfinite().all())
    assert weights[1, 1] == 0
    assert bool(weights[2].isnan().all())
    assert weights[3].tolist() == [0, 0]


def test_infinite_logits_share_the_softmax() -> None:
    x = torch.tensor([[0.0, torch.inf, 3.0, torch.inf], [3e38, -3e38, 0.0, 1.0]])
    for renormalize in (False, True):
        indices, weights = route_tokens(x, 3, renormalize=renormalize)
        assert indices.tolist() == [[1, 3, 2], [0, 3, 2]]
        assert weights.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


def test_capacity_serves_first_choices_first() -> None:
    x = torch.tensor([[2.0, 1.0, 0.0], [3.0, 1.0, 0.0], [1.0, 9.0, 0.0], [4.0, 0.0, 3.0]])
    full_indices, full_weights = route_tokens(x, 2)
    assert full_indices.tolist() == [[0, 1], [0, 1], [1, 0], [0, 2]]
    indices, weights = route_tokens(x, 2, capacity=2)
    # expert 0: first choices of tokens 0 and 1; expert 1: first choice of 2, then the second of 0
    assert indices.tolist() == [[0, 1], [0, -1], [1, -1], [-1, 2]]
    torch.testing.assert_close(weights, full_weights.masked_fill(indices < 0, 0), rtol=0, atol=0)
    by_score = route_tokens(x, 2, capacity=2, capacity_priority="score")[0]  # order of tokens: 2, 1, 3, 0
    assert by_score.tolist() == [[-1, -1], [0, 1], [1, -1], [0, 2]]
    halves = route_tokens(x, 2, capacity=1, capacity_group=2)[0]
    assert halves.tolist() == [[0, 1], [-1, -1], [1, -1], [0, 2]]


def test_a_drop_counts_as_a_place() -> None:
    """An expert that is full keeps counting: nobody moves up."""
    x = torch.tensor([[1.0, 0.0]] * 3)
    assert route_tokens(x, 2, capacity=1)[0].tolist() == [[0, 1], [-1, -1], [-1, -1]]


def test_expert_capacity() -> None:
    assert expert_capacity(197, 2, 8, 1.05) == 52
    assert expert_capacity(16, 2, 8, 1.0) == 4
    assert expert_capacity(17, 2, 8, 1.0) == 8
    assert expert_capacity(17, 2, 8, 1.0, multiple_of=1) == 5
    assert expert_capacity(1, 1, 64, 1.0) == 4
    with pytest.raises(ValueError, match="expert_capacity: factor must be positive, got 0"):
        expert_capacity(4, 1, 2, 0)


def test_a_token_alone_is_routed_as_in_its_batch(generator: torch.Generator) -> None:
    x = logits(generator, 37, 60)
    indices, weights = route_tokens(x, 4, score="sigmoid", renormalize=True)
    for t in (0, 17, 36):
        alone = route_tokens(x[t : t + 1], 4, score="sigmoid", renormalize=True)
        assert torch.equal(alone[0], indices[t : t + 1])
        assert torch.equal(alone[1], weights[t : t + 1])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"renormalize": True},
    {"renormalize": True, "eps": 0.3, "scale": 1.7},
    {"order": "topk_then_softmax"},
    {"score": "sigmoid"},
    {"score": "sigmoid", "renormalize": True, "eps": 1e-20, "scale": 2.5, "groups": 3, "top_groups": 2},
    {"capacity": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_of_the_weights_with_the_choice_held(generator: torch.Generator, options: dict[str, Any]) -> None:
    x = logits(generator, 13, 12).requires_grad_()
    bias = torch.randn(12, generator=generator, requires_grad=True)
    indices, weights = route_tokens(x, 4, bias=bias, **options)
    pull = torch.randn(weights.shape, generator=generator)
    (weights * pull).sum().backward()
    y = x.detach().double().requires_grad_()
    chosen = route_tokens(x.detach(), 4, bias=bias.detach(), **{**options, "capacity": None})[0].long()
    if options.get("order"):
        a = y.gather(1, chosen).softmax(1)
    else:
        p = y.sigmoid() if options.get("score") else y.softmax(1)
        a = p.gather(1, chosen)
        if options.get("renormalize"):
            a = a / (a.sum(1, keepdim=True) + options.get("eps", 0.0))
    a = a * options.get("scale", 1.0)
    (a * pull * (indices >= 0)).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-6, rtol=1e-5)
    assert bias.grad is None


def test_gradient_of_ties_and_infinities_is_finite() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [torch.nan, 0.0, 1.0], [-torch.inf, 0.0, 1.0]], requires_grad=True)
    route_tokens(x, 2)[1][:, 0].sum().backward()
    assert x.grad is not None
    y = torch.tensor([[1.0, 1.0, 1.0]], requires_grad=True)
    y.softmax(1)[0, 0].backward()
    torch.testing.assert_close(x.grad[:1], y.grad)
    assert bool(x.grad.isfinite().all())


MESSAGES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[T, E\], got \[3\]"),
    ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "logits must be float32, bfloat16 or float16"),
    ({"logits": torch.zeros(3, 1025)}, ValueError, r"with at most 1024 experts, got \[3, 1025\]"),
    ({"k": 0}, ValueError, "k must be from 1 to E = 8, got 0"),
    ({"k": 9}, ValueError, "k must be from 1 to E = 8, got 9"),
    ({"score": "tanh"}, ValueError, "score must be one of softmax, sigmoid, got 'tanh'"),
    ({"order": "last"}, ValueError, "order must be one of score_then_topk, topk_then_softmax, got 'last'"),
    ({"order": "topk_then_softmax", "score": "sigmoid"}, ValueError, "needs score 'softmax', got 'sigmoid'"),
    ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    ({"eps": torch.nan}, ValueError, "eps must not be negative, got nan"),
    ({"groups": 3}, ValueError, "groups must divide E = 8, got 3"),
    ({"groups": 0}, ValueError, "groups must divide E = 8, got 0"),
    ({"groups": 4, "top_groups": 5}, ValueError, "top_groups must be from 1 to groups = 4, got 5"),
    ({"groups": 4, "k": 3}, ValueError, "top_groups must hold k = 3 experts, got 1 groups with 2"),
    ({"groups": 4, "group_mask_value": 1.0}, ValueError, "group_mask_value must be -inf or 0.0, got 1.0"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias must be \[E\] with E = 8, got \[7\]"),
    ({"bias": torch.zeros(8, dtype=torch.float16)}, TypeError, "bias must be torch.float32, got torch.float16"),
    ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias must be on cpu like logits, got meta"),
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
    ({"capacity": 4, "capacity_group": 0}, ValueError, "capacity_group must be at least 1, got 0"),
    ({"capacity_group": 4}, ValueError, "capacity_group needs a capacity, got None"),
    ({"capacity": 4, "capacity_priority": "age"}, ValueError, "capacity_priority must be one of order, score"),
]


@pytest.mark.parametrize(("change", "error", "message"), MESSAGES, ids=[m[2][:40] for m in MESSAGES])
def test_messages(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(3, 8), "k": 2, **change}
    with pytest.raises(error, match="token_routing: .*" + message):
        route_tokens(arguments.pop("logits"), arguments.pop("k"), **arguments)


class Draw:
    """Choices and logits of one seed."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def pick(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=self.g))]

    def spoil(self, x: torch.Tensor, value: float, share: float) -> None:
        x[torch.rand(x.shape, generator=self.g) < share] = value

    def logits(self, tokens: int, experts: int) -> torch.Tensor:
        x = torch.randn(tokens, experts, generator=self.g)
        kind = self.pick("normal", "integers", "mean", "low", "wide", "huge", "small", "equal", "nan", "inf")
        if kind == "equal":
            return x[:, :1].expand(tokens, experts)
        if kind in ("nan", "inf"):
            self.spoil(x, torch.inf if kind == "inf" else torch.nan, self.pick(0.05, 0.5, 0.95))
            self.spoil(x, -torch.inf, self.pick(0.0, 0.5))
            self.spoil(x, torch.nan, self.pick(0.0, 0.3))
        kinds: dict[str, Any] = {"integers": x.round(), "mean": x + 100, "low": 30 * x - 80, "wide": 50 * x}
        return kinds.get(kind, x * {"huge": 1e37, "small": 1e-6}.get(kind, 1.0))

    def arguments(self) -> tuple:
        """Arguments of the op, without a capacity."""
        experts, tokens = self.pick(1, 2, 3, 5, 8, 16, 24, 60, 64, 65, 130, 256), self.pick(1, 2, 7, 16, 33, 70)
        k = min(experts, self.pick(1, 1, 2, 4, 8, 17, 200))
        order = self.pick("score_then_topk", "score_then_topk", "topk_then_softmax")
        score = "softmax" if order == "topk_then_softmax" else self.pick("softmax", "sigmoid")
        groups = self.pick(1, 1, *(n for n in range(1, experts + 1) if experts % n == 0))
        top = self.pick(*range(-(-k // (experts // groups)), groups + 1)) if groups > 1 else 1
        bias = torch.randn(experts, generator=self.g) * self.pick(0.1, 1.0) + self.pick(0, -2.0)
        x = self.logits(tokens, experts).to(self.pick(torch.float32, torch.float32, torch.bfloat16, torch.float16))
        return (x, self.pick(bias, torch.empty(0)), k, score, order, self.pick(True, False), self.pick(0.0, 1e-20, 0.3),
                self.pick(1.0, 2.5), groups, top, groups > 1 and self.pick(True, False), 0, 0, "order")  # fmt: skip


def test_random_inputs() -> None:
    for seed in range(150):
        draw = Draw(seed)
        args = draw.arguments()
        want = SPEC.reference(*args)
        print(f"seed {seed}: {tuple(args[0].shape)} {args[2:]}")  # shown by pytest where the comparison fails
        with cpu_capability(LEVELS[seed % len(LEVELS)]):
            weights, indices = SPEC.op(*args)
            compare(args, (weights, indices), want, 1e-6, 1e-5)
            limits = draw.pick(1, 3, 9), draw.pick(0, 5, 16), draw.pick("order", "score")
            fewer = SPEC.op(*args[:11], *limits)[::-1]
        keep = within_capacity(indices.long(), weights, args[0].shape[1], *limits)
        assert torch.equal(fewer[0], torch.where(keep, indices, -1))
        assert torch.equal(fewer[1].nan_to_num(7), torch.where(keep, weights, 0).nan_to_num(7))


def test_exports_with_dynamic_tokens() -> None:
    class Router(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return route_tokens(F.normalize(x, dim=1), 2, capacity=3, capacity_group=8)

    x = torch.randn(20, 6)
    program = torch.export.export(Router(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    longer = torch.randn(33, 6)
    for a, b in zip(program.module()(longer), Router()(longer), strict=True):
        assert torch.equal(a, b)
