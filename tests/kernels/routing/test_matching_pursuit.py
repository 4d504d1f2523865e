"""matching_pursuit against the published loop; identities, the layer, random arguments, promises and messages."""

import pytest
import torch

from planmill.kernels import ops
from planmill.kernels.routing import MatchingPursuit, pursue_matches


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def published(x: torch.Tensor, atoms: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense codes and residual of the published loop: one-hot codes times the dictionary, in float64."""
    r, codes = x.double(), torch.zeros(len(x), len(atoms), dtype=torch.float64)
    for _ in range(steps):
        value, index = (r @ atoms.double().T).max(1)
        taken = torch.nn.functional.one_hot(index, len(atoms)) * value[:, None]
        codes, r = codes + taken, r - taken @ atoms.double()
    return codes, r


@pytest.mark.parametrize(("t", "m", "d", "steps"), [(50, 3000, 96, 9), (3, 5000, 64, 5), (40, 100, 33, 8)])
def test_same_codes_as_the_published_loop(t: int, m: int, d: int, steps: int) -> None:
    x, atoms = normal(t, d), unit(m, d)
    values, indices, residual = pursue_matches(x, atoms, steps)
    codes, r = published(x, atoms, steps)
    got = torch.zeros(t, m, dtype=torch.float64).scatter_add_(1, indices.long(), values.double())
    same = (got - codes).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.9  # a near tie sends a token another way
    torch.testing.assert_close(residual[same].double(), r[same], atol=1e-5, rtol=1e-5)


def test_the_length_shrinks_by_the_values() -> None:
    x, atoms = normal(64, 80), unit(900, 80)
    values, indices, residual = pursue_matches(x, atoms, 12)
    squares = x.double().square().sum(1) - values.double().square().sum(1)
    torch.testing.assert_close(residual.double().square().sum(1), squares, atol=1e-4, rtol=1e-5)
    whole = residual + (values[:, :, None] * atoms[indices.long()]).sum(1)
    torch.testing.assert_close(whole, x, atol=1e-5, rtol=1e-5)


def test_the_largest_correlation_counts_with_its_sign_and_an_atom_may_repeat() -> None:
    atoms = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    values, indices, residual = pursue_matches(torch.tensor([[-3.0, 0.1]]), atoms, 3)
    assert indices.tolist() == [[1, 1, 1]]
    torch.testing.assert_close(values, torch.tensor([[0.05, 0.0375, 0.028125]]))  # not divided by |d|^2
    torch.testing.assert_close(residual, torch.tensor([[-3.0, 0.1 - 0.5 * 0.115625]]))


def test_a_token_does_not_depend_on_its_batch() -> None:
    x, atoms = normal(300, 72), unit(4000, 72)
    whole = pursue_matches(x, atoms, 6)
    for row in (0, 10, 299):
        for a, b in zip(whole, pursue_matches(x[row : row + 1], atoms, 6), strict=True):
            assert torch.equal(a[row : row + 1], b)


def test_atoms_that_bytes_cannot_tell_apart() -> None:
    """All within 1e-4 of one direction: the byte screen gives up, and the finer one answers."""
    near = torch.nn.functional.normalize(unit(1, 64) + 1e-4 * normal(2000, 64, seed=2), dim=1)
    args = (normal(40, 64), near, 3)
    spec = ops()["matching_pursuit"]
    assert spec.compare is not None
    spec.compare(args, spec.op(*args), spec.reference(*args), 1e-5, 1e-5)


def test_a_residual_that_overflows_stops_there() -> None:
    x = torch.tensor([[1e30, 0.0]])
    values, indices, residual = pursue_matches(x, torch.tensor([[1e20, 0.0], [0.0, 1.0]]), 2)
    assert indices[0, 1] == -1
    assert values[0, 1].isnan()
    assert not residual.isfinite().all()


WIDTHS = (1, 2, 3, 7, 16, 33, 64, 129, 257)


def draw(seed: int, dtype: torch.dtype) -> tuple:
    """Random sizes and kinds of data; now and then NaN or infinity."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: object) -> object:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    def rows(*shape: int) -> torch.Tensor:
        x, kind = (
            torch.randn(*shape, generator=g),
            pick("normal", "integers", "mean", "copies", "zeros", "mixed", "near"),
        )
        if kind == "integers":
            x = x.round()
        elif kind == "mean":
            x = x + 10
        elif kind == "copies":
            x = x[torch.randint(shape[0], (shape[0],), generator=g) // 3]
        elif kind == "zeros":
            x = x * (torch.rand(shape[0], 1, generator=g) > 0.5)
        elif kind == "mixed":
            x = x * 10 ** torch.randn(shape[0], 1, generator=g)
        elif kind == "near":
            x = x[:1] + 1e-3 * x
        if pick(0, 0, 0, 0, 1):
            x[torch.randint(shape[0], (max(1, shape[0] // 20),), generator=g), 0] = float(pick(torch.nan, torch.inf))  # type: ignore[arg-type]
        return x

    d = int(pick(*WIDTHS))  # type: ignore[call-overload]
    x, atoms = rows(int(pick(1, 3, 12, 97, 130)), d), rows(int(pick(1, 5, 127, 300, 1025, 2100)), d)  # type: ignore[call-overload]
    atoms = torch.where(atoms.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(atoms, dim=1), atoms)
    return x.to(dtype), atoms.to(dtype), int(pick(1, 2, 7))  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_inputs(dtype: torch.dtype) -> None:
    spec = ops()["matching_pursuit"]
    assert spec.compare is not None
    for seed in range(40):
        args = draw(seed, dtype)
        print(f"seed {seed}: {[tuple(a.shape) for a in args[:2]]}, {args[2]} steps")  # shown where the comparison fails
        want = (torch.empty(len(args[0]), args[2]), torch.empty(len(args[0]), args[2], dtype=torch.int32),
                torch.empty(args[0].shape))  # fmt: skip
        spec.compare(args, spec.op(*args), want, 1e-5, 1e-5)


def test_layer_loads_published_weights_and_reconstructs() -> None:
    layer = MatchingPursuit(24, 100, 5)
    state = {"dictionary._weights": 3 * normal(100, 24), "encoder.0.weight": normal(2, 2)}
    layer.load_state_dict(state)
    x = normal(2, 7, 24, seed=3)
    (values, indices), y = layer(x)
    assert values.shape == indices.shape == (2, 7, 5)
    atoms = torch.nn.functional.normalize(state["dictionary._weights"], dim=1)
    _, r = published(x.flatten(0, 1), atoms, 5)
    torch.testing.assert_close((x - y).flatten(0, 1).double(), r, atol=1e-5, rtol=1e-5)
    again, chosen, residual = layer.encode(x)
    assert torch.equal(chosen, indices)
    torch.testing.assert_close(layer.decode(again, chosen) + residual, x, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    assert layer.dictionary._weights.grad is not None
    assert layer.dictionary._weights.grad.isfinite().all()


def test_pre_bias_is_taken_off_and_added_again() -> None:
    layer = MatchingPursuit(8, 40, 3, pre_bias=True).requires_grad_(False)
    plain = MatchingPursuit(8, 40, 3).requires_grad_(False)
    assert layer.bias is not None
    layer.bias.copy_(normal(8))
    plain.load_state_dict({"dictionary._weights": layer.dictionary._weights})
    x = normal(6, 8, seed=4)
    torch.testing.assert_close(layer(x)[1], plain(x - layer.bias)[1] + layer.bias)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: pursue_matches(x[0], x, 1), ValueError, r"x must be \[T, D\], got \[4\]"),
        (lambda x: pursue_matches(x, x[:, :2], 1), ValueError, r"dictionary must be \[M, 4\] like x, got \[6, 2\]"),
        (lambda x: pursue_matches(x, x, -1), ValueError, "steps must be 0 or more, got -1"),
        (lambda x: pursue_matches(x[:, :0], x[:, :0], 1), ValueError, r"at least one channel, got \[6, 0\]"),
        (lambda x: pursue_matches(x, x.half(), 1), TypeError, "dictionary must be torch.float32 like x"),
        (lambda x: pursue_matches(x.double(), x.double(), 1), TypeError, "x must be float32, bfloat16 or float16"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(6, 4))  # type: ignore[operator]
