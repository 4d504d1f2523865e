"""Inputs of matching_pursuit that tests, benchmarks and plan checks share, and how a path is judged."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def _twice(dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    rows = unit(g, dtype, 90, 24)
    return torch.cat([rows, rows])


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: (normal(g, t, 5, 8), unit(g, t, 11, 8), 3), gradient=True, compiled=True),
        Case("one", lambda t, g: (normal(g, t, 1, 1), unit(g, t, 1, 1), 1), gradient=True),
        Case("no_steps", lambda t, g: (normal(g, t, 3, 4), unit(g, t, 5, 4), 0)),
        Case("no_tokens", lambda t, g: (normal(g, t, 0, 4), unit(g, t, 5, 4), 2)),
        Case("no_atoms", lambda t, g: (normal(g, t, 3, 4), unit(g, t, 0, 4), 2)),
        Case("zeros", lambda t, g: (normal(g, t, 9, 12) * 0, unit(g, t, 300, 12), 3)),
        Case("screened", lambda t, g: (normal(g, t, 37, 50), unit(g, t, 211, 50), 6)),
        Case("across_tiles", lambda t, g: (normal(g, t, 70, 97), unit(g, t, 1100, 97), 2)),
        Case("few_atoms", lambda t, g: (normal(g, t, 20, 33), unit(g, t, 7, 33), 12)),
        Case("undercomplete", lambda t, g: (normal(g, t, 20, 200), unit(g, t, 150, 200), 9)),
        Case("ties", lambda t, g: (integers(g, t, 30, 6), integers(g, t, 300, 6), 1)),
        Case("duplicates", lambda t, g: (normal(g, t, 31, 24), _twice(t, g), 2)),
        Case("long_atoms", lambda t, g: (normal(g, t, 9, 16), normal(g, t, 140, 16, scale=0.3), 4)),
        Case("strided", lambda t, g: (strided(normal(g, t, 20, 40)), strided(unit(g, t, 170, 40)), 4)),
        Case("large_mean", lambda t, g: (normal(g, t, 20, 40, mean=100.0), unit(g, t, 200, 40), 5)),
        Case("nan", lambda t, g: (poison_row(normal(g, t, 20, 24), 3), poison_row(unit(g, t, 300, 24), 7), 4)),
        Case(
            "infinity",
            lambda t, g: (
                poison_row(normal(g, t, 9, 8), 3, torch.inf),
                poison_row(unit(g, t, 40, 8), 7, -torch.inf),
                2,
            ),
        ),
        Case("no_usable_atom", lambda t, g: (normal(g, t, 3, 8), unit(g, t, 5, 8) * torch.nan, 2)),
        Case("tiny", lambda t, g: (normal(g, t, 20, 24, scale=1e-25), unit(g, t, 300, 24), 4), FLOAT32),
        Case("huge", lambda t, g: (normal(g, t, 20, 24, scale=1e25), unit(g, t, 300, 24), 4), FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Follows the path that was taken, in float64: every choice is the best of its own residual within `atol` of the
    lengths involved, values and residual are what the choices make them, and the lowest of equal atoms is taken.

    Two precisions part ways at a near tie, so indices are not compared with the reference's.
    """
    x, dictionary, steps = args
    values, indices, residual = got
    assert [o.dtype for o in got] == [o.dtype for o in want]
    assert [o.shape for o in got] == [o.shape for o in want]
    r, atoms = x.double(), dictionary.double()
    usable = atoms.isfinite().all(1)
    atoms = torch.where(usable[:, None], atoms, 0)
    lengths = atoms.norm(dim=1)
    longest = float(lengths.max()) if len(atoms) else 0.0
    alive = r.isfinite().all(1) & usable.any()
    assert torch.equal(indices >= 0, alive[:, None].expand(-1, steps)), "another number of matches"
    assert torch.equal(values.isnan(), ~alive[:, None].expand(-1, steps))
    torch.testing.assert_close(residual[~alive], x[~alive].float(), atol=0, rtol=0, equal_nan=True)
    r, chosen, v = r[alive], indices[alive].long(), values[alive].double()
    if not len(r):
        return
    first = (atoms[:, None] == atoms[None]).all(2).double().argmax(1) if len(atoms) <= 500 else torch.arange(len(atoms))
    assert torch.equal(first[chosen], chosen), "a later copy of an atom was chosen"
    size = r.norm(dim=1)  # lengths that have entered the residual
    for k in range(steps):
        c = torch.where(usable, r @ atoms.T, -torch.inf)
        best, own = c.amax(1), c.gather(1, chosen[:, k, None])[:, 0]
        slack = atol * size * longest + 1e-44
        assert bool((own >= best - slack).all()), f"step {k}: {float((best - own - slack).max())} from the best atom"
        assert bool(((v[:, k] - own).abs() <= slack).all()), f"step {k}: a value is not its correlation"
        if k == 0 and all(bool((t.double() == t.double().round()).nan_to_num().all()) for t in (x, dictionary)):
            assert torch.equal(chosen[:, 0], c.argmax(1)), "a tie did not go to the first atom"
        r = r - v[:, k, None] * atoms[chosen[:, k]]
        size = size + v[:, k].abs() * lengths[chosen[:, k]]
    assert bool(((residual[alive].double() - r).norm(dim=1) <= atol * size + 1e-44).all()), "x is not residual + sum"
