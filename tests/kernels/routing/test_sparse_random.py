"""sparse_encoding and sparse_decoding on random shapes, modes and kinds of data, against their references."""

from typing import Any

import pytest
import torch

from planmill.kernels import cpu_capabilities, cpu_capability, ops

DRAWS = 40
KINDS = ("normal", "unit", "integers", "mean", "copies", "large", "small", "mixed", "zeros", "near", "poison")


class Draw:
    """One random input."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def pick(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=self.g))]

    def data(self, *shape: int) -> torch.Tensor:
        """Values of a random kind, along the last dimension."""
        x, kind = torch.randn(*shape, generator=self.g), self.pick(*KINDS)
        rows = torch.randn(*shape[:-1], 1, generator=self.g)
        if kind == "unit":
            return torch.nn.functional.normalize(x, dim=-1)
        if kind == "integers":
            return x.round()
        if kind == "mean":
            return x + float(self.pick(1.0, 30.0, 1e3))
        if kind == "copies":
            return x[..., :1, :].expand(*shape).clone() if len(shape) > 1 else x[:1].expand(*shape).clone()
        if kind in ("large", "small"):
            return x * (1e12 if kind == "large" else 1e-12)
        if kind == "mixed":
            return x * 10 ** (3 * rows)
        if kind == "zeros":
            return x * (rows > 0.5)
        if kind == "near":
            return x[..., :1] + 1e-4 * x
        if kind == "poison":
            hit = torch.rand(*shape, generator=self.g) < 0.3 / shape[-1]
            return torch.where(hit, self.pick(torch.nan, torch.inf, -torch.inf), x)
        return x


def encoding(draw: Draw, dtype: torch.dtype) -> tuple:
    d, k = draw.pick(1, 7, 16, 50, 129), draw.pick(1, 2, 9, 40, 300)
    tokens, m = draw.pick(1, 3, 11, 12, 13, 97, 130), draw.pick(1, 5, 63, 300, 1023, 1025, 4100)
    mode = draw.pick("topk", "abs_topk", "jump_relu")
    bias = draw.data(m) * draw.pick(0.1, 1.0, 10.0) if draw.pick(True, True, False) else torch.empty(0)
    threshold = draw.data(m) * draw.pick(0.0, 1.0, 3.0) if mode == "jump_relu" else torch.empty(0)
    x, weight = draw.data(tokens, d), draw.data(m, d) * draw.pick(1.0, d**-0.5)
    return *(t.to(dtype) for t in (x, weight, bias, threshold)), k, mode


def decoding(draw: Draw, dtype: torch.dtype) -> tuple:
    d, k, tokens, m = draw.pick(1, 7, 50, 129), draw.pick(1, 3, 4, 9, 40), draw.pick(1, 5, 97), draw.pick(1, 63, 1025)
    bias = torch.randn(d, generator=draw.g) if draw.pick(True, False) else torch.empty(0)
    indices = torch.randint(-1, m, (tokens, k), generator=draw.g, dtype=torch.int32)
    dictionary = torch.randn(m, d, generator=draw.g)
    return torch.randn(tokens, k, generator=draw.g), indices, dictionary.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_encoding(dtype: torch.dtype) -> None:
    spec = ops()["sparse_encoding"]
    assert spec.compare is not None
    for seed in range(DRAWS):
        args = encoding(Draw(seed), dtype)
        level = cpu_capabilities()[seed % len(cpu_capabilities())]
        print(f"seed {seed}: {[tuple(a.shape) for a in args[:4]]}, {args[4:]}, {level}")  # shown where it fails
        with cpu_capability(level):
            got = spec.op(*args)
        spec.compare(args, got, spec.reference(*args), *spec.tolerances[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t)[6:])
def test_decoding(dtype: torch.dtype) -> None:
    spec = ops()["sparse_decoding"]
    for seed in range(DRAWS):
        args = decoding(Draw(seed), dtype)
        print(f"seed {seed}: {[tuple(a.shape) for a in args]}")
        atol, rtol = spec.tolerances[dtype]
        torch.testing.assert_close(spec.op(*args), spec.reference(*args), atol=4 * atol, rtol=rtol)


def _next_best(args: tuple, values: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor) -> None:
    """The largest is left out, and what would have come next stands at the end."""
    longer = ops()["sparse_encoding"].reference(*args[:4], args[4] + 1, args[5])
    values.copy_(longer[0][:, 1:])
    indices.copy_(longer[1][:, 1:])


MUTATIONS = {
    "a value": lambda args, values, indices, counts: values[2].mul_(1.0001),
    "an index": lambda args, values, indices, counts: indices[2, 1].add_(1),
    "the order": lambda args, values, indices, counts: (values.copy_(values.flip(1)), indices.copy_(indices.flip(1))),
    "a count": lambda args, values, indices, counts: counts[3].sub_(1),
    "the next best": _next_best,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation: str) -> None:
    spec = ops()["sparse_encoding"]
    assert spec.compare is not None
    g = torch.Generator().manual_seed(0)
    args = torch.randn(9, 16, generator=g), torch.randn(60, 16, generator=g), torch.empty(0), torch.empty(0), 5, "topk"
    want = spec.reference(*args)
    spec.compare(args, want, want, 1e-6, 1e-6)
    got = tuple(t.clone() for t in want)
    MUTATIONS[mutation](args, *got)
    with pytest.raises(AssertionError):
        spec.compare(args, got, want, 1e-6, 1e-6)
