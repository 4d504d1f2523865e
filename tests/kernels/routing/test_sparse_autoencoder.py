"""SparseAutoencoder and its two ops against plain restatements of the published forms, and their messages.

Restated from their definitions: TopK as in EleutherAI/sparsify (MIT), JumpReLU and the archetypal dictionary as in
KempnerInstitute/overcomplete (MIT); neither package is imported.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from planmill.kernels import cpu_capabilities, cpu_capability
from planmill.kernels.routing import SparseAutoencoder, decode_sparsely, encode_sparsely

D, M, K = 24, 300, 7


def published(x: torch.Tensor, state: dict, k: int, transcode: bool) -> torch.Tensor:
    """sparsify: ReLU first, k largest, dense decoding."""
    h = (x if transcode else x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    top = h.relu().topk(k, dim=1, sorted=False)
    out = torch.zeros_like(h).scatter_(1, top.indices, top.values) @ state["W_dec"] + state["b_dec"]
    return out + x @ state["W_skip"].T if "W_skip" in state else out


def dense_codes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """overcomplete: codes = relu(h), and what is strictly below theta is zeroed."""
    h = x @ weight.T + bias
    codes = h.relu()
    codes[h < theta] = 0
    return codes


def scattered(values: torch.Tensor, indices: torch.Tensor, m: int) -> torch.Tensor:
    """The dense code [T, m] of a sparse one."""
    dense = torch.zeros(len(values), m + 1).scatter_(1, indices.long() % (m + 1), values)
    return dense[:, :m]


def state_of(g: torch.Generator, skip: bool = False) -> dict[str, torch.Tensor]:
    sizes: dict[str, tuple[int, ...]] = {"encoder.weight": (M, D), "encoder.bias": (M,), "W_dec": (M, D), "b_dec": (D,)}
    if skip:
        sizes["W_skip"] = (D, D)
    return {name: torch.randn(size, generator=g) for name, size in sizes.items()}


@pytest.mark.parametrize("level", cpu_capabilities())
@pytest.mark.parametrize("tokens", [1, 11, 50])
@pytest.mark.parametrize("transcode", [False, True])
def test_topk_as_published(level: str, tokens: int, transcode: bool, generator: torch.Generator) -> None:
    state, x = state_of(generator, skip=transcode), torch.randn(tokens, D, generator=generator)
    layer = SparseAutoencoder.from_state_dict(state, K, transcode=transcode)
    with cpu_capability(level):
        got = layer(x)
    torch.testing.assert_close(got, published(x, state, K, transcode), atol=1e-4, rtol=1e-4)
    assert set(layer.state_dict()) == set(state)


@pytest.mark.parametrize("tokens", [3, 40])
def test_jump_relu_as_published_and_equality_is_kept(tokens: int, generator: torch.Generator) -> None:
    x, weight = (torch.randint(-2, 3, (n, D), generator=generator).float() for n in (tokens, M))
    bias, theta = torch.zeros(M), torch.randint(0, 12, (M,), generator=generator).float()
    codes = dense_codes(x, weight, bias, theta)
    assert bool((codes == theta)[codes > 0].any()), "equality must happen"
    values, indices, counts = encode_sparsely(x, weight, bias, M, mode="jump_relu", threshold=theta)
    assert torch.equal(scattered(values, indices, M), codes)
    assert torch.equal(counts, (codes > 0).sum(1).int())


def test_zero_thresholds_are_relu(generator: torch.Generator) -> None:
    x, weight = torch.randn(30, D, generator=generator), torch.randn(M, D, generator=generator)
    values, indices, _ = encode_sparsely(x, weight, None, M, mode="jump_relu", threshold=torch.zeros(M))
    torch.testing.assert_close(scattered(values, indices, M), (x @ weight.T).relu())


def test_abs_topk_keeps_signs(generator: torch.Generator) -> None:
    x, weight = torch.randn(30, D, generator=generator), torch.randn(M, D, generator=generator)
    values, indices, counts = encode_sparsely(x, weight, None, K, mode="abs_topk")
    h = x @ weight.T
    top = h.abs().topk(K, dim=1).indices
    torch.testing.assert_close(values, h.gather(1, top), atol=1e-5, rtol=1e-5)
    assert torch.equal(indices.long(), top)
    assert bool((values < 0).any())
    assert bool((counts == K).all())


@pytest.mark.parametrize("mode", ["topk", "abs_topk", "jump_relu"])
def test_a_token_does_not_depend_on_its_batch(mode: str, generator: torch.Generator) -> None:
    """Alone a token is scanned, among 12 or more it is screened: the same bits."""
    x, weight = torch.randn(40, 129, generator=generator), torch.randn(2000, 129, generator=generator)
    bias, theta = torch.randn(2000, generator=generator), torch.full((2000,), 25.0)
    options: dict[str, Any] = {"mode": mode, "threshold": theta if mode == "jump_relu" else None}
    together = encode_sparsely(x, weight, bias, 9, **options)
    for t in (0, 7, 39):
        for whole, alone in zip(together, encode_sparsely(x[t : t + 1], weight, bias, 9, **options), strict=True):
            assert torch.equal(whole[t : t + 1], alone)


def crowded(g: torch.Generator, theta: float) -> tuple[SparseAutoencoder, torch.Tensor]:
    state = state_of(g) | {"threshold": torch.full((M,), theta)}
    return SparseAutoencoder.from_state_dict(state, K), torch.randn(20, D, generator=g)


def test_more_active_latents_than_room_are_all_returned(generator: torch.Generator) -> None:
    layer, x = crowded(generator, 4.0)
    values, indices = layer.encode(x)
    codes = dense_codes(x - layer.b_dec, layer.encoder.weight, layer.encoder.bias, torch.full((M,), 4.0))
    assert K < values.shape[1] == int((codes > 0).sum(1).max())
    torch.testing.assert_close(scattered(values, indices, M), codes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x), codes @ layer.W_dec + layer.b_dec, atol=1e-3, rtol=1e-3)


def test_compiled_it_says_nan_where_there_is_no_room(generator: torch.Generator) -> None:
    layer, x = crowded(generator, 9.0)
    counts = (dense_codes(x - layer.b_dec, layer.encoder.weight, layer.encoder.bias, torch.full((M,), 9.0)) > 0).sum(1)
    fits = counts <= K
    assert bool(fits.any())
    assert not bool(fits.all())
    torch.compiler.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got[fits], layer(x)[fits], atol=1e-5, rtol=1e-5)
    assert bool(got[~fits].isnan().all())


def test_more_than_1024_active_latents_raise() -> None:
    layer = SparseAutoencoder(4, 1100, 8, "jump_relu")
    nn.init.ones_(layer.encoder.weight)
    with pytest.raises(ValueError, match="a token has 1100 active latents, at most 1024 fit"):
        layer(torch.ones(2, 4))


def test_shapes_dtypes_and_nothing(generator: torch.Generator) -> None:
    layer = SparseAutoencoder.from_state_dict(state_of(generator), K)
    x = torch.randn(2, 5, 3, D, generator=generator)
    values, indices = layer.encode(x)
    assert values.shape == indices.shape == (2, 5, 3, K)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 2)).view_as(x))
    assert layer(torch.empty(0, D)).shape == (0, D)
    half = layer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.encode(x.bfloat16())[0].dtype == torch.float32


def test_nan_stays_in_its_token(generator: torch.Generator) -> None:
    layer = SparseAutoencoder.from_state_dict(state_of(generator), K)
    x = torch.randn(20, D, generator=generator)
    clean = layer(x)
    x[4, 3] = torch.nan
    spoilt = layer(x)
    assert bool(spoilt[4].isnan().all())
    assert torch.equal(spoilt[torch.arange(20) != 4], clean[torch.arange(20) != 4])


def test_other_names(generator: torch.Generator) -> None:
    state, x = state_of(generator), torch.randn(15, D, generator=generator)
    theta = torch.rand(M, generator=generator) * 9
    named = {"W_enc": state["encoder.weight"].T, "b_enc": state["encoder.bias"], "W_dec": state["W_dec"]}
    named |= {"b_dec": state["b_dec"], "log_threshold": theta.log()}
    layer = SparseAutoencoder.from_state_dict(named, M)
    codes = dense_codes(x - state["b_dec"], state["encoder.weight"], state["encoder.bias"], theta)
    torch.testing.assert_close(layer(x), codes @ state["W_dec"] + state["b_dec"], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"lacks W_dec, and these of its tensors are not understood: b_other"):
        SparseAutoencoder.from_state_dict({"W_enc": named["W_enc"], "b_other": theta}, K)


@pytest.mark.parametrize("archetypal", [False, True])
def test_linear_with_batch_norm_and_both_dictionaries(archetypal: bool, generator: torch.Generator) -> None:
    block = nn.Sequential(nn.Linear(D, M), nn.BatchNorm1d(M)).eval()
    norm = block[1]
    for tensor in (norm.weight, norm.running_var):
        tensor.data = torch.rand(M, generator=generator) + 0.5
    for tensor in (norm.bias, norm.running_mean):
        tensor.data = torch.randn(M, generator=generator)
    state = {f"encoder.final_block.{name}": tensor for name, tensor in block.state_dict().items()}
    if archetypal:  # rows in the convex hull of points, relaxed, times exp(multiplier)
        share, points = torch.rand(M, 40, generator=generator), torch.randn(40, D, generator=generator)
        relax, log_gain = 0.1 * torch.randn(M, D, generator=generator), torch.tensor(0.3)
        parts = {"W": share, "C": points, "Relax": relax, "multiplier": log_gain}
        state |= {f"dictionary.{name}": tensor for name, tensor in parts.items()}
        dictionary = (share / share.sum(1, keepdim=True) @ points + relax) * log_gain.exp()
    else:
        atoms = torch.randn(M, D, generator=generator)
        state["dictionary._weights"] = atoms
        dictionary = atoms / atoms.norm(dim=1, keepdim=True)
    state["thresholds"] = torch.full((M,), -3.0)
    layer = SparseAutoencoder.from_state_dict(state, M)
    x = torch.randn(25, D, generator=generator)
    h = block(x)
    codes = torch.where(h < torch.tensor(-3.0).exp(), 0, h)
    torch.testing.assert_close(layer(x), codes @ dictionary, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("mode", ["topk", "abs_topk", "jump_relu"])
def test_gradient_of_the_dense_formula_without_its_matrix(mode: str, generator: torch.Generator) -> None:
    state, x = state_of(generator), torch.randn(60, D, generator=generator)
    if mode == "jump_relu":
        state["threshold"] = torch.full((M,), 9.0)
    layer = SparseAutoencoder.from_state_dict(state, 64, mode)
    cotangent = torch.randn(60, D, generator=generator)
    x.requires_grad_()
    with Largest() as seen:
        layer(x).backward(cotangent)
    assert seen.elements < 60 * M
    mine = [x.grad, *(p.grad for name, p in layer.named_parameters() if name != "threshold")]
    other = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    z = x.detach().clone().requires_grad_()
    h = (z - other["b_dec"]) @ other["encoder.weight"].T + other["encoder.bias"]
    if mode == "jump_relu":
        codes = torch.where(h >= 9.0, h, 0)
    else:
        kept = (h.relu() if mode == "topk" else h.abs()).topk(64, dim=1).indices
        codes = h * torch.zeros_like(h).scatter_(1, kept, 1.0)
        codes = codes.relu() if mode == "topk" else codes
    (codes @ other["W_dec"] + other["b_dec"]).backward(cotangent)
    theirs = [z.grad, *(p.grad for name, p in other.items() if name != "threshold")]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_the_layer_exports_with_any_number_of_tokens(generator: torch.Generator) -> None:
    layer = SparseAutoencoder.from_state_dict(state_of(generator, skip=True), K)
    x = torch.randn(20, D, generator=generator)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    longer = torch.randn(31, D, generator=generator)
    torch.testing.assert_close(program.module()(longer), layer(longer))


X, W = torch.zeros(3, 4), torch.zeros(5, 4)
ENCODING_ERRORS = [
    ({"x": X[0]}, ValueError, r"x must be \[T, D\], got \[4\]"),
    ({"weight": W[:, :3]}, ValueError, r"weight must be \[M, 4\] like x, with D >= 1, got \[5, 3\]"),
    ({"x": X[:, :0], "weight": W[:, :0]}, ValueError, r"with D >= 1, got \[5, 0\]"),
    ({"x": X.double()}, TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
    ({"weight": W.half()}, TypeError, "weight must be torch.float32 like x, got torch.float16"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\] like the rows of weight, got \[4\]"),
    ({"bias": torch.zeros(5).half()}, TypeError, "bias must be torch.float32 like x"),
    ({"k": 0}, ValueError, "k must be from 1 to 1024, got 0"),
    ({"k": 1025}, ValueError, "k must be from 1 to 1024, got 1025"),
    ({"mode": "softmax"}, ValueError, "mode must be one of topk, abs_topk, jump_relu, got 'softmax'"),
    ({"mode": "jump_relu"}, ValueError, "threshold belongs to mode jump_relu, got jump_relu and no threshold"),
    ({"threshold": torch.zeros(5)}, ValueError, r"threshold belongs to mode jump_relu, got topk and a threshold \[5\]"),
    ({"mode": "jump_relu", "threshold": torch.zeros(4)}, ValueError, r"threshold must be \[5\]"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on cpu like x, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), ENCODING_ERRORS)
def test_what_encoding_refuses(change: dict, error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {"x": X, "weight": W, "bias": None, "k": 2} | change
    with pytest.raises(error, match=f"sparse_encoding: .*{message}"):
        encode_sparsely(**args)


CODE = torch.zeros(3, 2, dtype=torch.int32)
DECODING_ERRORS = [
    ({"values": X[0]}, ValueError, r"values must be \[T, k\], got \[4\]"),
    ({"indices": CODE[0]}, ValueError, r"indices must be \[T, k\], got \[2\]"),
    ({"indices": CODE[:, :1]}, ValueError, r"values must be \[3, 1\] like indices, got \[3, 2\]"),
    ({"indices": CODE.long()}, TypeError, "indices must be torch.int32, got torch.int64"),
    ({"values": torch.zeros(3, 2).half()}, TypeError, "values must be torch.float32 like dictionary"),
    ({"dictionary": W[0]}, ValueError, r"dictionary must be \[M, D\], got \[4\]"),
    ({"dictionary": W.double()}, TypeError, "dictionary must be float32, bfloat16 or float16"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\], got \[3\]"),
    ({"indices": CODE + 5}, ValueError, "indices must be -1 or below M = 5, got 5"),
    ({"indices": CODE - 2}, ValueError, "indices must be -1 or below M = 5, got -2"),
    ({"indices": CODE.to("meta")}, ValueError, "indices must be on cpu like dictionary, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), DECODING_ERRORS)
def test_what_decoding_refuses(change: dict, error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {"values": torch.zeros(3, 2), "indices": CODE, "dictionary": W} | change
    with pytest.raises(error, match=f"sparse_decoding: {message}"):
        decode_sparsely(**args)


def test_what_the_layer_refuses() -> None:
    with pytest.raises(ValueError, match="SparseAutoencoder: k must be from 1 to 1024, got 0"):
        SparseAutoencoder(4, 8, 0)
    with pytest.raises(ValueError, match="SparseAutoencoder: mode must be one of"):
        SparseAutoencoder(4, 8, 2, "relu6")
