"""What a benchmark is: a case with its inputs, its peers, its check and its goals. Nothing runs here."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Draw:
    """Fresh random inputs of one run; never zeros, never the same twice unless the seed is given.

    Args:
        dtype: of the float tensors.
        device: "cpu" or "cuda".
        generator: on the CPU, so that a seed means the same inputs on every device.
    """

    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def normal(self, *shape: int) -> torch.Tensor:
        """Gaussian values."""
        return self._finish(torch.randn(*shape, generator=self.generator))

    def unit(self, *shape: int) -> torch.Tensor:
        """Unit rows in all directions: in 1024 dimensions, all about equally far from each other."""
        return self._finish(torch.nn.functional.normalize(torch.randn(*shape, generator=self.generator), dim=-1))

    def clusters(self, *shape: int, centers: torch.Tensor, noise: float = 0.5) -> torch.Tensor:
        """Unit rows around `centers` [K, D], as patch features are: neighbours near (0.63 at noise 0.5), others far."""
        chosen = centers[torch.randint(len(centers), shape[:-1], generator=self.generator)]
        rows = torch.randn(*shape, generator=self.generator).mul_(noise / shape[-1] ** 0.5).add_(chosen)
        return self._finish(torch.nn.functional.normalize(rows, dim=-1))

    def centers(self, count: int, width: int) -> torch.Tensor:
        """Centres for `clusters`, shared by what is drawn around them; float32, on the CPU."""
        return torch.nn.functional.normalize(torch.randn(count, width, generator=self.generator), dim=-1)

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).to(self.device)


@dataclass(frozen=True)
class Goal:
    """What an issue asks for. Changed by an issue, never by a result.

    Args:
        kind: "ratio" (peer p50 / ours p50, at least), "error" (max_error, at most), "memory" (extra_bytes, at most),
            "time" (p50_ms, at most), "gemm" (flops_per_s as a share of gemm_flops_per_s, at least) or "copy"
            (bytes_per_s as a share of copy_bytes_per_s, at least).
        value: the number asked for.
        peer: of a ratio: the name of the peer, or None for each of them.
        dtype: the dtype that it is asked for, or None for each of the case's.
        needs: "" (always), "amx" (only where AMX runs), "no amx" (only where AMX is absent or switched off).
        device: the kind of device that it is asked of.
    """

    kind: Literal["ratio", "error", "memory", "time", "gemm", "copy"]
    value: float
    peer: str | None = None
    dtype: torch.dtype | None = None
    needs: Literal["", "amx", "no amx"] = ""
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Peer:
    """What a user would run instead.

    Args:
        prepare: `prepare(*args)` does what is not timed (conversion, building an index) and returns the call to time.
        finish: brings the call's result into the form that the case's check reads; not timed.
        package: must be importable; where it is not, the peer is left out with a note.
        devices: where it runs.
        tolerance: largest error that passes the check; None: the case's own.
        yardstick: computes something else, for scale only; it is not checked.
    """

    prepare: Callable[..., Callable[[], Any]]
    finish: Callable[[Any], Any] = lambda result: result
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    tolerance: float | None = None
    yardstick: bool = False


@dataclass(frozen=True)
class Case:
    """One measurement of one op.

    Args:
        op: the op's name; the backend that ran is asked from `planmill.kernels.which`.
        id: readable name, unique within the op.
        make: draws the arguments of `ours`.
        ours: the public function, called as `ours(*args)`.
        peers: what it is measured against, by name.
        check: `check(args, result)` returns the largest error against float64 (of a random part where the whole would
            take too long), in the units that the file of the op states; it judges ours and every peer before timing.
        tolerance: largest error that passes, per dtype.
        flops: `flops(*args)`: operations that the definition needs, nothing counted twice.
        bytes: `bytes(*args)`: bytes that the definition must read and write; None: all arguments and the result, once.
        small: arguments of the same kind, quick to compute: for `--quick`, and to warm up a memory measurement.
        dtypes, devices: where the case runs.
        goals: what an issue asks for.
        memory: whether extra memory is measured too.
        calls: calls per timed sample, for what is too short to time alone.
        reports_ms: the calls return their time in milliseconds instead of being timed.
        sweep: (what grows, how large it is here), for the plot of time against size.
        package: that the arguments are made with; where it is not importable, the case is left out with a note.
        file: "family/file" that the case stands in; `select` sets it.
    """

    op: str
    id: str
    make: Callable[[Draw], tuple]
    ours: Callable[..., Any]
    peers: Mapping[str, Peer]
    check: Callable[[tuple, Any], float] | None = None
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    flops: Callable[..., float] = lambda *args: 0.0
    bytes: Callable[..., float] | None = None
    small: Callable[[Draw], tuple] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    devices: tuple[str, ...] = ("cpu", "cuda")
    goals: tuple[Goal, ...] = ()
    memory: bool = False
    calls: int = 1
    reports_ms: bool = False
    sweep: tuple[str, int] | None = None
    package: str | None = None
    file: str = ""

    def goals_for(self, dtype: torch.dtype) -> list[Goal]:
        """The goals that speak of this dtype."""
        return [goal for goal in self.goals if goal.dtype in (None, dtype)]


def plain(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """A peer that needs no preparation."""
    return lambda *args: lambda: function(*args)


def files() -> dict[str, list[str]]:
    """The files that hold cases: family -> names. Nothing is imported."""
    root = importlib.import_module(__package__)
    families = [Path(root.__path__[0]) / module.name for module in pkgutil.iter_modules(root.__path__) if module.ispkg]
    return {path.name: sorted(m.name for m in pkgutil.iter_modules([str(path)])) for path in families}


def select(wanted: str | None) -> list[Case]:
    """The cases of "family", "family/op", or all of them; no other file is imported, nor what it needs.

    Raises:
        LookupError: no such family or op; the message lists what there is.
    """
    everything = files()
    family, _, op = (wanted or "").partition("/")
    names = ", ".join(f"{f}/{o}" for f, ops in everything.items() for o in ops)
    if family and family not in everything:
        raise LookupError(f"no benchmark family {family!r}; there are {', '.join(everything)} ({names})")
    if op and op not in everything[family]:
        raise LookupError(f"no benchmark {wanted!r}; there are {names}")
    return [
        replace(case, file=f"{name}/{file}")
        for name in everything
        if family in ("", name)
        for file in everything[name]
        if op in ("", file)
        for case in importlib.import_module(f"{__package__}.{name}.{file}").CASES
    ]
