"""The selective scan and its gradient's chunks against the definition, MambaMixer against transformers' mixer."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from planmill.kernels import ops
from planmill.kernels.attention import MambaMixer, scan_selectively
from planmill.kernels.attention.selective_scan.cases import drawn
from planmill.kernels.attention.selective_scan.chunks import scan_in_chunks
from planmill.kernels.common.inputs import strided


def arguments(seed: int) -> tuple:
    """Random sizes, groups, options, strides, steps from tiny to huge, and growing states (A above 0)."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    softplus, groups = pick(True, True, False), pick(1, 1, 2, 3)
    args = drawn(
        torch.float32, g, pick(0, 1, 3), groups * pick(1, 2, 5, 16, 17), pick(1, 2, 7, 16), pick(1, 4, 9, 32, 33, 70),
        groups, skip=pick(True, False), gated=pick(True, False), biased=softplus and pick(True, False),
        softplus=softplus, rate=pick(-16.0, -1.0, -1000.0, 0.02, 0.0), scale=pick(1e-3, 1.0, 5.0),
    )  # fmt: skip
    tensors = list(args[:8])
    for index in (0, 1, 3, 4, 6):
        if pick(0, 1) and tensors[index].dim() > 1:
            tensors[index] = pick(strided, lambda x: x.mT.contiguous().mT)(tensors[index])
    return (*tensors, softplus)


def test_random_draws() -> None:
    spec = ops()["selective_scan"]
    for seed in range(70):
        args = arguments(seed)
        print(f"seed {seed}: {[list(a.shape) if isinstance(a, torch.Tensor) else a for a in args]}")
        wanted = spec.reference(*args)
        for found in (spec.op(*args), scan_in_chunks(*args)):
            for got, want in zip(found, wanted, strict=True):
                loose = 2e-5 * max(1.0, float(want.abs().amax()) if want.numel() else 1.0)
                torch.testing.assert_close(got, want, atol=loose, rtol=2e-5)


@pytest.mark.usefixtures("two_threads")
def test_a_sample_alone_and_in_a_batch() -> None:
    """The same bits; and a NaN reaches the later positions of its own channel."""
    args = drawn(torch.float32, torch.Generator().manual_seed(3), 3, 20, 5, 40)
    y, state = scan_selectively(*args)
    one = [a[1:2] if a.dim() > 2 else a for a in args[:8]]
    alone, its_state = scan_selectively(*one, args[8])
    assert torch.equal(y[1:2], alone)
    assert torch.equal(state[1:2], its_state)
    poisoned = [a.clone() for a in args[:8]]
    poisoned[0][0, 2, 13] = torch.nan
    z, _ = scan_selectively(*poisoned, args[8])
    assert z[0, 2, 13:].isnan().all()
    z[0, 2, 13:] = y[0, 2, 13:]
    assert torch.equal(z, y)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)], ids=["no_samples", "no_tokens"])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = MambaMixer(8, 3, bidirectional=True)(x)
    y.sum().backward()
    assert y.shape == shape
    u = torch.zeros(shape, requires_grad=True).mT
    y, state = scan_selectively(u, u, torch.ones(8, 3), u[:, :3], u[:, :3])
    (y.sum() + state.sum()).backward()
    assert y.shape == u.shape
    assert not state.any()


def test_groups_may_be_left_out() -> None:
    u, delta, A, B, C, *_ = drawn(torch.float32, torch.Generator().manual_seed(4), 2, 6, 3, 7)
    got, want = scan_selectively(u, delta, A, B[:, 0], C[:, 0]), scan_selectively(u, delta, A, B, C)
    assert torch.equal(got[0], want[0])


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


def test_a_new_mixer_is_sensible() -> None:
    torch.manual_seed(0)
    mixer = MambaMixer(48)
    steps = nn.functional.softplus(mixer.get_parameter("dt_proj.bias").detach())
    assert float(steps.min()) >= 0.999e-3
    assert float(steps.max()) <= 0.1001
    assert mixer.dt_rank == 3
    torch.testing.assert_close(mixer.get_parameter("A_log")[7].exp(), torch.arange(1.0, 17.0))


def test_one_graph_and_export_with_dynamic_length() -> None:
    torch.compiler.reset()
    model, x = MambaMixer(8, 3, bidirectional=True).eval(), torch.randn(2, 9, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: length},))
        more = torch.randn(5, 13, 8)
        torch.testing.assert_close(program.module()(more), model(more))


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
G: dict[str, Any] = dict(zip(NAMES, drawn(torch.float32, torch.Generator(), 2, 6, 4, 11), strict=True))


def scan(**changed: Any) -> object:
    return scan_selectively(**{**G, **changed})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scan(u=G["u"][0]), ValueError, r"selective_scan: u must be \[B, Di, L\], got"),
        (lambda: scan(A=G["A"][0]), ValueError, r"A must be \[Di, Ns\], got \[4\]"),
        (lambda: scan(A=G["A"] + 0j), TypeError, "A must be float32.* got torch.complex64"),
        (lambda: scan(z=G["z"][..., 1:]), ValueError, r"z must be \[2, 6, 11\], got \[2, 6, 10\]"),
        (lambda: scan(D=G["D"][1:]), ValueError, r"D must be \[6\], got \[5\]"),
        (lambda: scan(C=G["C"][:, 0]), ValueError, r"C must be \[2, 1, 4, 11\], got \[2, 4, 11\]"),
        (lambda: scan(delta=G["delta"].to("meta")), ValueError, "delta must be on cpu like u"),
        (lambda: scan(B=G["B"].half()), TypeError, "B must be torch.float32 like u, got torch.float16"),
        (lambda: scan(delta_bias=G["D"].long()), TypeError, "delta_bias must be float32.* got torch.int64"),
        (lambda: scan(B=G["B"].expand(2, 4, 4, 11)), ValueError, "groups that divides 6 channels"),
        (lambda: MambaMixer(4)(torch.zeros(3, 4)), ValueError, r"MambaMixer: x must be \[B, L, 4\], got \[3, 4\]"),
    ],
)  # fmt: skip
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
