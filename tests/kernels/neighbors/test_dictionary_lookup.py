"""lookup_dictionary against entmax, as a projection onto the simplex, at any batch, at random; DictAS's layer."""

import pytest
import torch

from planmill.kernels import cpu_capabilities, cpu_capability, ops
from planmill.kernels.neighbors import DictionaryLookup, TokenGenerator, lookup_dictionary

WEIGHTINGS = ("sparsemax", "entmax15")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(queries: torch.Tensor, keys: torch.Tensor, scale: float, weighting: str) -> torch.Tensor:
    return lookup_dictionary(queries, keys, torch.eye(len(keys)), scale=scale, weighting=weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("scale", [3.0, 0.3, 0.02], ids=["few", "some", "all"])
def test_equals_entmax(scale: float, weighting: str) -> None:
    """Oracle: entmax 1.3 (MIT), `sparsemax` and `entmax15`, in float64."""
    entmax = pytest.importorskip("entmax")
    queries, keys, values = normal(40, 20), normal(333, 20, seed=1), normal(333, 30, seed=2)
    weights = getattr(entmax, weighting)((queries.double() @ keys.double().T) * scale, dim=1)
    got = lookup_dictionary(queries, keys, values, scale=scale, weighting=weighting)
    torch.testing.assert_close(got.double(), weights @ values.double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights_of(queries, keys, scale, weighting).double(), weights, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weights_solve_the_projection(weighting: str) -> None:
    """No sorting here: the conditions of optimality, on the float64 scores. p > 0 where the slack of the score is 0."""
    queries, keys = normal(50, 24), normal(1500, 24, seed=1)
    weights = weights_of(queries, keys, 0.5, weighting).double()
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64), atol=1e-6, rtol=0)
    assert bool((weights >= 0).all())
    chosen = weights > 0
    assert bool((chosen.sum(1) < 150).all())
    scores = 0.5 * queries.double() @ keys.double().T
    level = scores - weights if weighting == "sparsemax" else scores / 2 - weights.sqrt()
    tau = level.masked_fill(~chosen, -torch.inf).amax(1)
    assert bool((tau - level.masked_fill(~chosen, torch.inf).amin(1) < 1e-5).all()), "chosen atoms differ in tau"
    assert bool((level.masked_fill(chosen, -torch.inf).amax(1) <= tau + 1e-6).all()), "an atom above tau is left out"


def test_equal_atoms_share_alike() -> None:
    keys = normal(3, 8).repeat(500, 1)
    weights = weights_of(normal(14, 8, seed=1), keys, 1.0, "sparsemax").view(14, 500, 3)
    assert torch.equal(weights, weights[:, :1].expand_as(weights))


@pytest.mark.parametrize("level", cpu_capabilities())
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["listed", "compared"])
def test_a_query_does_not_depend_on_the_others(scale: float, level: str) -> None:
    """Alone it is compared with every atom; among many most atoms are ruled out first, or too many are left."""
    queries, keys, values = normal(100, 33), normal(4200, 33, seed=1), normal(4200, 270, seed=2)
    with cpu_capability(level):
        together = lookup_dictionary(queries, keys, values, scale=scale)
        for i in (0, 57, 99):
            assert torch.equal(lookup_dictionary(queries[i : i + 1], keys, values, scale=scale), together[i : i + 1])


def test_leading_dimensions() -> None:
    queries, keys, values = normal(2, 3, 5, 8), normal(30, 8, seed=1), normal(30, 4, seed=2)
    got = lookup_dictionary(queries, keys, values)
    assert got.shape == (2, 3, 5, 4)
    assert torch.equal(got[1, 2], lookup_dictionary(queries[1, 2], keys, values, scale=8**-0.5))
    assert lookup_dictionary(queries[:0], keys, values).shape == (0, 3, 5, 4)


def test_what_is_not_chosen_is_not_read() -> None:
    keys, values = torch.eye(3), torch.tensor([[1.0, 2.0], [3.0, torch.inf], [torch.nan, torch.nan]])
    got = lookup_dictionary(torch.eye(3), keys, values, scale=5.0)
    assert torch.equal(got[0], values[0])
    assert got[1, 0] == 3
    assert bool(got[1, 1].isnan())
    assert bool(got[2].isnan().all())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_random_inputs(weighting: str) -> None:
    spec = ops()["dictionary_lookup"]
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        n, m, d, width = (s[int(torch.randint(len(s), (1,), generator=g))] for s in
                          ((1, 12, 13, 97), (1, 5, 300, 1025, 2100), (1, 7, 33, 130), (1, 16, 40, 300)))  # fmt: skip
        spread = 10 ** (2 * torch.rand(2, generator=g))
        queries = torch.randn(n, d, generator=g) * spread[0] + float(seed % 3 == 0) * 30
        keys = torch.randn(m, d, generator=g) * spread[1] + float(seed % 4 == 0) * 300
        if seed % 5 == 0:
            keys = keys.round()
        reach = float(queries.norm(dim=1).median() * (keys - keys.mean(0)).norm(dim=1).median().clamp_min(1.0))
        scale = 10 ** float(3 * torch.rand(1, generator=g)) / reach
        args = queries, keys, torch.randn(m, width, generator=g), scale, weighting
        print(f"seed {seed}: {n} {m} {d} {width} {scale}")  # shown by pytest where the comparison fails
        torch.testing.assert_close(spec.op(*args), spec.reference(*args), atol=1e-5, rtol=1e-5)


Q, K, V = normal(3, 4), normal(5, 4, seed=1), normal(5, 2, seed=2)
MESSAGES = [
    ((Q[0], K, V, {}), ValueError, r"queries must be \[..., N, D\], got \[4\]"),
    ((Q, K[0], V, {}), ValueError, r"keys must be \[m, D\], got \[4\]"),
    ((Q, K, V[0], {}), ValueError, r"values must be \[m, Dv\], got \[2\]"),
    ((Q, K[:, :3], V, {}), ValueError, r"keys must be \[m, 4\] like queries, got \[5, 3\]"),
    ((Q[:, :0], K[:, :0], V, {}), ValueError, r"keys must be \[m, D\] with D at least 1, got \[5, 0\]"),
    ((Q, K[:0], V[:0], {}), ValueError, r"keys must hold at least one atom, got \[0, 4\]"),
    ((Q, K, V[:4], {}), ValueError, r"values must be \[5, Dv\] like keys, got \[4, 2\]"),
    ((Q, K, V, {"scale": 0.0}), ValueError, r"scale must be positive and finite, got 0\.0"),
    ((Q, K, V, {"scale": float("nan")}), ValueError, r"scale must be positive and finite, got nan"),
    ((Q, K, V, {"weighting": "softmax"}), ValueError, r"weighting must be one of sparsemax, entmax15, got 'softmax'"),
    ((Q.long(), K, V, {}), TypeError, r"queries must be float32, bfloat16 or float16, got torch\.int64"),
    ((Q, K.half(), V, {}), TypeError, r"keys must be torch\.float32 like queries, got torch\.float16"),
    ((Q, K, V.half(), {}), TypeError, r"values must be torch\.float32 like queries, got torch\.float16"),
    ((Q, K.to("meta"), V, {}), ValueError, r"keys must be on cpu like queries, got meta"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MESSAGES)
def test_messages(arguments: tuple, error: type[Exception], message: str) -> None:
    *tensors, options = arguments
    with pytest.raises(error, match="dictionary_lookup: " + message):
        lookup_dictionary(*tensors, **options)


def dictas_state(dim: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of a DictAS checkpoint, with something of its text branch."""
    shapes = {"q_proj.weight": 2, "k_proj.weight": 2, "v_proj.weight": 2, "norm1.weight": 1, "norm1.bias": 1,
              "TwoLayerMLP.linear1.weight": 2, "TwoLayerMLP.linear1.bias": 1, "TwoLayerMLP.linear2.weight": 2,
              "TwoLayerMLP.linear2.bias": 1, "TwoLayerMLP.norm.weight": 1, "TwoLayerMLP.norm.bias": 1,
              "TwoLayerMLP.linear3.weight": 2}  # fmt: skip
    parts = ("Query_Generator.", "Key_Generator.", "Value_Generator.AttnBlock.")
    names = [(part + name, rank) for part in parts for name, rank in shapes.items()]
    state = {name: normal(*(dim,) * rank, seed=seed) / dim**0.5 for seed, (name, rank) in enumerate(names)}
    return {**state, "Fuse_Feature.compress.bias": torch.zeros(1)}


def published_generator(x: torch.Tensor, state: dict[str, torch.Tensor], part: str, heads: int) -> torch.Tensor:
    """A generator in float64, written from its formula, head by head."""
    own = {name.removeprefix(part): t.double() for name, t in state.items() if name.startswith(part)}
    width = x.shape[1]

    def norm(t: torch.Tensor, name: str) -> torch.Tensor:
        centred = t - t.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * own[name + ".weight"] + own[name + ".bias"]

    h = norm(x, "norm1")
    q, k, v = (h @ own[f"{name}_proj.weight"].T for name in "qkv")
    parts = [slice(i, i + width // heads) for i in range(0, width, width // heads)]
    mixed = [((q[:, s] @ k[:, s].T) * (width // heads) ** -0.5).softmax(1) @ v[:, s] for s in parts]
    first = torch.cat(mixed, 1) @ own["TwoLayerMLP.linear1.weight"].T + own["TwoLayerMLP.linear1.bias"] + h
    second = first @ own["TwoLayerMLP.linear2.weight"].T + own["TwoLayerMLP.linear2.bias"]
    return norm(second, "TwoLayerMLP.norm") @ own["TwoLayerMLP.linear3.weight"].T


def test_equals_the_formulas_of_dictas() -> None:
    """Oracle: the definitions in float64, entmax (MIT) for sparsemax; DictAS (MIT) was read for names and order."""
    entmax = pytest.importorskip("entmax")
    state = dictas_state(16)
    layer = DictionaryLookup.from_dictas(state).eval()
    support, x = normal(3, 7, 16, seed=90), normal(2, 9, 16, seed=91)
    found, distance = layer.fit(support)(x)
    tokens = support.double().flatten(0, 1)
    keys = published_generator(tokens, state, "Key_Generator.", 4)
    values = tokens + published_generator(tokens, state, "Value_Generator.AttnBlock.", 4)
    for b in range(2):
        queries = published_generator(x[b].double(), state, "Query_Generator.", 4)
        want = entmax.sparsemax(queries @ keys.T / 4, dim=1) @ values
        torch.testing.assert_close(found[b].double(), want, atol=1e-5, rtol=1e-5)
        cosine = (x[b].double() * want).sum(1) / (x[b].double().norm(dim=1) * want.norm(dim=1))
        torch.testing.assert_close(distance[b].double(), (1 - cosine) / 2, atol=1e-6, rtol=1e-5)


def test_a_layer_without_generators_finds_its_own_tokens() -> None:
    support = torch.nn.functional.normalize(normal(40, 24), dim=1)
    layer = DictionaryLookup(24, scale=20.0, generated=False).fit(support)
    assert not list(layer.parameters())
    found, distance = layer(support[None, :5])
    torch.testing.assert_close(found[0], support[:5])
    assert float(distance.detach().abs().max()) < 1e-6
    assert bool((layer(-support[None, :5])[1] > 0.2).all())


def test_the_dictionary_travels_in_the_state_dict() -> None:
    layer = DictionaryLookup(8, heads=2).fit(normal(5, 8))
    other = DictionaryLookup(8, heads=2)
    other.load_state_dict(layer.state_dict())
    x = normal(1, 3, 8, seed=1)
    assert torch.equal(layer(x)[0], other(x)[0])


def test_the_layer_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    layer = DictionaryLookup(8, heads=2).fit(normal(5, 8)).eval()
    x = normal(2, 3, 8, seed=1)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_messages_of_the_layer() -> None:
    layer = DictionaryLookup(8, heads=2)
    with pytest.raises(ValueError, match=r"DictionaryLookup: there is no dictionary: call fit first"):
        layer(normal(1, 3, 8))
    with pytest.raises(ValueError, match=r"support must be \[m, 8\] or \[images, P, 8\] with at least one token, got"):
        layer.fit(normal(0, 8))
    with pytest.raises(ValueError, match=r"x must be \[B, N, 8\], got \[3, 8\]"):
        layer.fit(normal(4, 8))(normal(3, 8))
    with pytest.raises(ValueError, match=r"weighting must be one of sparsemax, entmax15, got 'softmax'"):
        DictionaryLookup(8, weighting="softmax")
    with pytest.raises(ValueError, match=r"TokenGenerator: dim must be a multiple of heads, got 8 and 3"):
        TokenGenerator(8, 3)
    state = dictas_state(8)
    del state["Value_Generator.AttnBlock.norm1.bias"]
    with pytest.raises(ValueError, match=r"the state dict lacks Value_Generator\.AttnBlock\.norm1\.bias"):
        DictionaryLookup.from_dictas(state)
