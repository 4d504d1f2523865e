"""What a session adds to its payload: a call of the session less a call of the payload, in turns, one thread.

The peer is the payload itself, for scale.
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from planmill.engine import DynamicDim, Session, build

from ..cases import Case, Goal, Peer

CALLS = 400


@functools.cache
def session() -> Session:
    """A plan with almost nothing to compute, built once per run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.plan"
        build(model, torch.randn(2, 8), path, dynamic=DynamicDim("batch", 1, 2, 8))
        return Session(path)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Waking a second one costs more than all that is measured here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def difference(*, fill: bool) -> Callable[[torch.Tensor], float]:
    """Milliseconds of a call beyond the payload's: the medians of calls that take turns."""

    def run(x: torch.Tensor) -> float:
        opened = session()
        outputs, payload = opened.allocate_outputs(x), opened._run
        assert payload is not None
        whole, alone = [], []
        with one_thread():
            for _ in range(CALLS):
                before = time.perf_counter()
                payload([x])
                between = time.perf_counter()
                opened(x, outputs=outputs) if fill else opened(x)
                whole.append(time.perf_counter() - between)
                alone.append(between - before)
        return 1e3 * (sorted(whole)[CALLS // 2] - sorted(alone)[CALLS // 2])

    return run


def payload_ms(x: torch.Tensor) -> float:
    """Milliseconds of a call of the payload."""
    payload = session()._run
    assert payload is not None
    with one_thread():
        before = time.perf_counter()
        for _ in range(CALLS):
            payload([x])
        return 1e3 * (time.perf_counter() - before) / CALLS


CASES = [
    Case(
        op="session_overhead",
        id=name,
        make=lambda draw: (draw.normal(1, 8),),
        ours=difference(fill=fill),
        peers={"payload": Peer(lambda x: lambda: payload_ms(x), yardstick=True)},
        devices=("cpu",),
        goals=(Goal("time", 0.03),),
        reports_ms=True,
    )
    for name, fill in (("new-outputs", False), ("filled-outputs", True))
]
