"""Selective scan and linear recurrence against their definitions step by step, MambaMixer against transformers'."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from planmill.kernels.attention import LinearRecurrence, MambaMixer, reach_final_state, scan_selectively
from planmill.kernels.attention.state_space.reference import final_state_reference, selective_scan_reference
from planmill.kernels.common.inputs import normal, strided


def drawn(
    seed: int, batch: int = 2, channels: int = 6, states: int = 4, length: int = 11, groups: int = 1,
    dtype: torch.dtype = torch.float32, scale: float = 1.0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Arguments of a scan as trained models have them: A negative, time steps after softplus."""
    g = torch.Generator().manual_seed(seed)
    full = (batch, channels, length)
    return {
        "u": normal(g, dtype, *full, scale=scale), "delta": normal(g, dtype, *full, scale=scale),
        "A": -torch.rand(channels, states, generator=g) * 16, "B": normal(g, dtype, batch, groups, states, length),
        "C": normal(g, dtype, batch, groups, states, length), "D": normal(g, torch.float32, channels),
        "z": normal(g, dtype, *full), "delta_bias": normal(g, torch.float32, channels, mean=-2.0),
    }  # fmt: skip


@pytest.mark.parametrize("length", [0, 1, 2, 3, 15, 16, 17, 49, 196])
def test_scan_equals_its_steps(length: int) -> None:
    args = drawn(length, length=length)
    y, state = scan_selectively(**args, delta_softplus=True)
    want, last = selective_scan_reference(**args, delta_softplus=True)
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.double(), last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_in_half_precision(dtype: torch.dtype) -> None:
    args = drawn(1, length=30, dtype=dtype)
    y, _ = scan_selectively(**args, delta_softplus=True)
    want, _ = selective_scan_reference(**args, delta_softplus=True)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), want, atol=2e-2, rtol=1e-2)


def test_scan_on_random_draws() -> None:
    """Sizes, groups, options, strides, steps from tiny to huge, and growing states (A above 0)."""
    for seed in range(80):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: Any) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        groups = pick(1, 1, 2, 3)
        args: dict[str, Any] = drawn(
            seed, pick(0, 1, 3), groups * pick(1, 2, 5), pick(1, 2, 7, 16), pick(1, 4, 9, 10, 33, 64), groups,
            scale=pick(1e-3, 1.0, 5.0),
        )  # fmt: skip
        if groups == 1 and pick(0, 1):
            args["B"], args["C"] = args["B"][:, 0], args["C"][:, 0]
        for name in ("D", "z", "delta_bias"):
            args[name] = pick(args[name], None)
        if pick(0, 1):
            args["u"], args["z"] = strided(args["u"]), None if args["z"] is None else strided(args["z"])
        args["delta_softplus"] = pick(True, True, False)
        if not args["delta_softplus"]:
            args["delta"], args["delta_bias"] = args["delta"].abs() * 0.1, None
        args["A"] = args["A"] * pick(1.0, 100.0, -0.005, 0.0)
        got, _ = scan_selectively(**args)
        whole = {**args, "B": args["B"].unflatten(1, (groups, -1)) if args["B"].dim() == 3 else args["B"],
                 "C": args["C"].unflatten(1, (groups, -1)) if args["C"].dim() == 3 else args["C"]}  # fmt: skip
        want, _ = selective_scan_reference(**whole)
        print(f"seed {seed}: { ({k: list(v.shape) for k, v in args.items() if isinstance(v, torch.Tensor)}) }")
        loose = 1e-5 * max(1.0, float(want.abs().amax()) if want.numel() else 1.0)
        torch.testing.assert_close(got.double(), want, atol=loose, rtol=1e-5)


def test_a_nan_reaches_later_positions_only() -> None:
    args = drawn(3, length=30)
    clean, _ = scan_selectively(**args, delta_softplus=True)
    one = {k: v[1:] if v.dim() > 2 else v for k, v in args.items()}
    alone, _ = scan_selectively(**one, delta_softplus=True)
    args["u"][0, 2, 13] = torch.nan
    y, _ = scan_selectively(**args, delta_softplus=True)
    assert y[0, 2, 13:].isnan().all()
    assert torch.equal(y[0, 2, :13], clean[0, 2, :13])
    assert torch.equal(y[0, 3], clean[0, 3])
    torch.testing.assert_close(y[1:], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 121])
def test_final_state_equals_its_steps(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    transition = normal(g, torch.float32, 12, 12, scale=0.25)
    projection, bias = normal(g, torch.float32, 12, 5), normal(g, torch.float32, 12)
    for x in (normal(g, torch.float32, 3, count, 5), strided(normal(g, torch.bfloat16, 3, count, 5))):
        got = reach_final_state(x, transition, projection, bias)
        want = final_state_reference(x, transition, projection, bias)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    got = reach_final_state(x.half(), 1.1 * torch.eye(12), projection.half())  # a growing state
    want = final_state_reference(x, 1.1 * torch.eye(12), projection.half(), torch.zeros(12))
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, atol=float(want.abs().max()) * 2e-3 + 1e-6, rtol=2e-3)


def transformers_mixer(channels: int) -> nn.Module:
    """transformers' MambaMixer (Apache-2.0), imported with the checkout off the path: see its `kernels`."""
    root = str(Path(__file__).parents[3])
    with mock.patch.object(sys, "path", [entry for entry in sys.path if entry not in ("", root)]):
        module = importlib.import_module("transformers.models.mamba.modeling_mamba")
        config = module.MambaConfig(hidden_size=channels, state_size=5, num_hidden_layers=1, use_bias=True)
        torch.manual_seed(0)
        mixer = module.MambaMixer(config, 0)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mixer.eval()


def test_mixer_equals_transformers() -> None:
    """Oracle: the slow path of transformers' MambaMixer (Apache-2.0), whose parameters have Mamba's names."""
    theirs = transformers_mixer(20)
    mine = MambaMixer(20, 5, bias=True)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 37, 20)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine(x)[:, :9], mine(x[:, :9]), atol=1e-5, rtol=1e-5)  # causal
    x = torch.randn(1, 6, 20)
    for name, mixer in (("mine", mine), ("theirs", theirs)):
        y = x.clone().requires_grad_()
        mixer(y).square().sum().backward()
        if name == "mine":
            kept = [y.grad, *(p.grad for p in mine.parameters())]
    for a, b in zip(kept, [y.grad, *(dict(theirs.named_parameters())[n].grad for n, _ in mine.named_parameters())],
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_two_ways_are_one_way_twice() -> None:
    both = MambaMixer(12, 4, bidirectional=True).eval()
    ways = [MambaMixer(12, 4).eval() for _ in range(2)]
    state = both.state_dict()
    for suffix, way in zip(("", "_b"), ways, strict=True):
        names = {"A_log": f"A{suffix}_log", "D": f"D{suffix}"}
        names |= {n: n.replace(".", f"{suffix}.") for n in state if n.startswith(("conv1d.", "x_proj.", "dt_proj."))}
        names |= {n: n for n in state if n.startswith(("in_proj", "out_proj"))}
        way.load_state_dict({mine: state[theirs] for mine, theirs in names.items()})
    x = torch.randn(2, 19, 12)
    with torch.no_grad():
        want = ways[0](x) + ways[1](x.flip(1)).flip(1)
        torch.testing.assert_close(both(x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both(x)[1:], both(x[1:]), atol=1e-6, rtol=1e-5)
        strange = x.transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(both(strange), both(x))


def test_new_layers_are_sensible() -> None:
    torch.manual_seed(0)
    mixer = MambaMixer(48)
    steps = nn.functional.softplus(mixer.get_parameter("dt_proj.bias").detach())
    assert float(steps.min()) >= 0.999e-3
    assert float(steps.max()) <= 0.1001
    assert mixer.dt_rank == 3
    torch.testing.assert_close(mixer.get_parameter("A_log")[7].exp(), torch.arange(1.0, 17.0))
    layer = LinearRecurrence(5, 8)
    with torch.no_grad():
        s = torch.zeros(2, 8)
        x = torch.randn(2, 6, 5)
        for t in range(6):
            s = layer.transition(s) + layer.projection(x[:, t])
        torch.testing.assert_close(layer(x), s)
        assert layer.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


class Both(nn.Module):
    """A two-way mixer, then the state that its tokens leave."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.state = MambaMixer(8, 3, bidirectional=True), LinearRecurrence(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.state(self.mixer(x))


def test_one_graph_and_export_with_a_dynamic_batch() -> None:
    torch.compiler.reset()
    model, x = Both().eval(), torch.randn(2, 9, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = torch.randn(5, 9, 8)
        torch.testing.assert_close(program.module()(more), model(more))


def test_memory_of_a_scan_does_not_grow_with_states_times_length() -> None:
    """Largest tensor made: 2 sqrt(L) of the L positions of one state would be held, not all L Ns."""
    args = drawn(0, batch=1, channels=8, states=16, length=4096)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [out] if isinstance(out, torch.Tensor) else []
            largest = max([largest, *(t.numel() for t in made)])
            return out

    with torch.no_grad(), Watch():
        scan_selectively(**args, delta_softplus=True)
    assert largest <= 16 * 4096 * 2, "u is 8 x 4096; B and C 16 x 4096"
    assert largest < 8 * 16 * 4096 // 4
    assert math.isqrt(4096) == 64


G = drawn(0)
X, W, V = torch.zeros(2, 3, 4), torch.zeros(6, 6), torch.zeros(6, 4)


def scan(**changed: Any) -> object:
    return scan_selectively(**{**G, **changed})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scan(u=G["u"][0]), ValueError, r"scan_selectively: u must be \[B, Di, L\], got"),
        (lambda: scan(A=G["A"][0]), ValueError, r"A must be \[Di, Ns\], got \[4\]"),
        (lambda: scan(A=G["A"] + 0j), TypeError, "A must be float32.* got torch.complex64"),
        (lambda: scan(z=G["z"][..., 1:]), ValueError, r"z must be \[2, 6, 11\], got \[2, 6, 10\]"),
        (lambda: scan(D=G["D"][1:]), ValueError, r"D must be \[6\], got \[5\]"),
        (lambda: scan(C=G["C"][:, 0]), ValueError, r"C must be \[2, 1, 4, 11\], got \[2, 4, 11\]"),
        (lambda: scan(delta=G["delta"].to("meta")), ValueError, "delta must be on cpu like u"),
        (lambda: scan(B=G["B"].expand(2, 4, 4, 11)), ValueError, "groups that divides 6 channels"),
        (lambda: reach_final_state(X[0], W, V), ValueError, r"reach_final_state: x must be \[B, T, D\], got \[3, 4\]"),
        (lambda: reach_final_state(X.int(), W, V), TypeError, "x must be float32.* got torch.int32"),
        (lambda: reach_final_state(X, W[1:], V), ValueError, r"transition must be \[5, 5\], got \[5, 6\]"),
        (lambda: reach_final_state(X, W, V[:, 1:]), ValueError, r"projection must be \[6, 4\], got \[6, 3\]"),
        (lambda: reach_final_state(X, W, V, W[0, 1:]), ValueError, r"bias must be \[6\], got \[5\]"),
        (lambda: reach_final_state(X, W.to("meta"), V), ValueError, "transition must be on cpu like x, got meta"),
        (lambda: MambaMixer(4)(X[0]), ValueError, r"MambaMixer: x must be \[B, L, 4\], got \[3, 4\]"),
    ],
)  # fmt: skip
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
