"""Runs cases: checks every implementation against float64, then times them in turns, and makes the rows."""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from planmill import kernels

from . import machine
from .cases import Case, Draw, Goal, Peer
from .memory import MemoryUnknown, measure, nbytes
from .timing import Quantiles, Sampler, alternate

RESULTS = Path(__file__).parent / "results"
LOWER_IS_BETTER = ("error", "memory", "time")

# Every row has these, in this order; DESIGN names the first twenty.
FIELDS = (
    *("op", "case", "dtype", "device", "impl", "peer", "p20_ms", "p50_ms", "p80_ms", "peer_p50_ms", "ratio", "goal"),
    *("max_error", "extra_bytes", "flops_per_s", "bytes_per_s", "gemm_flops_per_s", "copy_bytes_per_s", "commit"),
    *("versions", "goals", "peer_p20_ms", "peer_p80_ms", "peer_max_error", "peer_extra_bytes"),
    *("rounds", "sweep", "seed", "time", "quick", "p99_ms", "peer_p99_ms"),
)

Row = dict[str, Any]
Missed = tuple[Case, torch.dtype, Goal, str]  # a goal that was not measured, and why


class WrongResult(Exception):
    """An implementation computes something else than the op's definition; it must not be timed."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Args:
        device: "cpu" or "cuda".
        isa: instruction set that our CPU kernels are held to; None: the highest that the machine has.
        threads: None leaves every library its default.
        rounds: at least this many samples per implementation.
        budget_s: time for more rounds, per case.
        quick: small inputs and no memory: shows that everything runs; goals are not judged.
        seed: of the inputs.
    """

    device: str = "cpu"
    isa: str | None = None
    threads: int | None = None
    rounds: int = 9
    budget_s: float = 10.0
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One case at one dtype and, on the CPU, one instruction set."""

    case: Case
    dtype: torch.dtype
    isa: str

    @property
    def dtype_name(self) -> str:
        """As in a row: "float32"."""
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Session:
    """What the rows of one run share.

    Args:
        settings: how to measure.
        ceilings: from `machine.ceilings`, of this run.
        commit: of the checkout.
        note: called with what a reader must know and no row says, e.g. a peer that is not installed.
        progress: called with the number of steps done.
    """

    settings: Settings
    ceilings: dict[str, float | None]
    commit: str
    note: Callable[[str], None] = print
    progress: Callable[[], None] = lambda: None
    noted: set[str] = field(default_factory=set)
    missed: list[Missed] = field(default_factory=list)  # goals that no row will speak of

    def note_once(self, text: str) -> None:
        """Pass on a note the first time that it comes up."""
        if text not in self.noted:
            self.noted.add(text)
            self.note(text)


def level() -> str:
    """The instruction set that our CPU kernels use now; "reference" without the extension."""
    from planmill.kernels.common import cpu

    extension = cpu.extension()
    return cpu.LEVELS[extension.cpu_capability()] if extension is not None else "reference"


def unmet(goal: Goal, device: str, isa: str) -> str:
    """Why a goal is not asked of a run at this instruction set, or "" when it is."""
    if goal.device != device:
        return f"asked of {goal.device}"
    if goal.needs == "amx" and isa != "amx":
        here = "held to " + isa if "amx" in kernels.cpu_capabilities() else "not on this machine"
        return f"needs AMX: {here}"
    if goal.needs == "no amx" and isa == "amx":
        return "asked with AMX switched off: --isa avx512"
    return ""


def plan(cases: list[Case], settings: Settings, dtype: torch.dtype | None = None) -> list[Run]:
    """The runs of these cases on this device.

    A case with a goal for a processor without AMX runs twice where AMX runs: once with it and once held to avx512.
    """
    runs = []
    for case in cases:
        if settings.device not in case.devices:
            continue
        for kind in case.dtypes:
            if dtype not in (None, kind):
                continue
            top = settings.isa or level()
            runs.append(Run(case, kind, top))
            if settings.device == "cpu" and not settings.isa and top == "amx":
                runs += [Run(case, kind, "avx512") for goal in case.goals_for(kind) if goal.needs == "no amx"][:1]
    return runs


def left_out(cases: list[Case], settings: Settings, dtype: torch.dtype | None = None) -> list[Missed]:
    """The goals of cases that this device does not run, each with the reason."""
    absent = settings.device == "cpu" and not torch.cuda.is_available()
    reason = "needs CUDA: not on this machine" if absent else "needs --device {}"
    return [
        (case, kind, goal, reason.format(case.devices[0]))
        for case in cases
        if settings.device not in case.devices
        for kind in case.dtypes
        if dtype in (None, kind)
        for goal in case.goals_for(kind)
    ]


def execute(run: Run, session: Session) -> list[Row]:
    """Check, time and measure one run; one row per peer, none where the case needs a package that is absent.

    Raises:
        WrongResult: ours or a peer fails the case's check.
    """
    settings, case = session.settings, run.case
    if why := _absent(case.package):
        session.note_once(f"{case.op}: no case {case.id}: {why} (pip install 'planmill[models]')")
        session.missed += [(case, run.dtype, goal, why) for goal in case.goals_for(run.dtype)]
        return []
    held = settings.device == "cpu" and run.isa in kernels.cpu_capabilities()
    with kernels.cpu_capability(run.isa) if held else nullcontext():
        try:
            samples, errors, flops, moved, shared = _time(run, session)
        except WrongResult:
            session.missed += [(case, run.dtype, goal, "wrong result") for goal in case.goals_for(run.dtype)]
            raise
    times = {name: Quantiles.of(values) for name, values in samples.items()}
    memory = _memory(run, session, list(times))
    ours = times[""]
    rows = []
    for name, peer in times.items():
        if name == "":
            continue
        row = dict.fromkeys(FIELDS) | shared
        row |= {"peer": name, "p20_ms": ours.p20, "p50_ms": ours.p50, "p80_ms": ours.p80}
        row |= {"peer_p20_ms": peer.p20, "peer_p50_ms": peer.p50, "peer_p80_ms": peer.p80}
        row |= {"p99_ms": ours.p99, "peer_p99_ms": peer.p99}
        row |= {"ratio": peer.p50 / ours.p50, "rounds": len(samples[""])}
        row |= {"max_error": errors.get(""), "peer_max_error": errors.get(name)}
        row |= {"extra_bytes": memory.get(""), "peer_extra_bytes": memory.get(name)}
        row |= {"flops_per_s": flops / ours.p50 * 1e3 or None, "bytes_per_s": moved / ours.p50 * 1e3 or None}
        row["goals"] = [judge(goal, row, run, settings) for goal in case.goals_for(run.dtype) if _concerns(goal, name)]
        asked = [goal["asked"] for goal in row["goals"] if goal["kind"] == "ratio" and not goal["reason"]]
        row["goal"] = asked[0] if asked else None
        rows.append(row)
    return rows


def _time(run: Run, session: Session) -> tuple[dict[str, list[float]], dict[str, float], float, float, Row]:
    """Samples and errors of ours ("") and the peers; the operations and bytes that the work needs; shared fields."""
    settings, case = session.settings, run.case
    torch.manual_seed(settings.seed)  # of the checks, which look at random parts
    draw = Draw(run.dtype, settings.device, torch.Generator().manual_seed(settings.seed))
    args = ((case.small if settings.quick else None) or case.make)(draw)
    peers = dict(_usable(run, session))
    calls: dict[str, Callable[[], Any]] = {"": partial(case.ours, *args)}
    calls |= {name: peer.prepare(*args) for name, peer in peers.items()}
    sampler = Sampler(settings.device, case.calls, case.reports_ms)
    budget_s = 0.0 if settings.quick else settings.budget_s
    with machine.limited(settings.threads):  # after `prepare`, which loads the libraries that it limits
        errors, produced = _check(run, args, calls, peers)
        samples = alternate(calls, sampler, settings.rounds, budget_s, session.progress)
        shared = _shared(run, session)
    moved = nbytes(args) + produced if case.bytes is None else float(case.bytes(*args))
    return samples, errors, float(case.flops(*args)), moved, shared


def judge(goal: Goal, row: Row, run: Run, settings: Settings) -> dict[str, Any]:
    """Asked beside reached. `met` is None where the goal is not asked of this run; `reason` then says why."""
    reached: float | None
    if goal.kind in ("gemm", "copy"):
        rates = ("flops_per_s", "gemm_flops_per_s") if goal.kind == "gemm" else ("bytes_per_s", "copy_bytes_per_s")
        rate, ceiling = (row[name] for name in rates)
        reached = rate / ceiling if rate and ceiling else None
    else:
        names = {"ratio": "ratio", "error": "max_error", "memory": "extra_bytes", "time": "p50_ms"}
        reached = row[names[goal.kind]]
    reason = unmet(goal, settings.device, run.isa) or ("not at quick sizes" if settings.quick else "")
    if not reason and reached is None:
        reason = "not measured"
    met = None
    if not reason and reached is not None:
        met = reached <= goal.value if goal.kind in LOWER_IS_BETTER else reached >= goal.value
    return {"kind": goal.kind, "asked": goal.value, "reached": reached, "met": met, "reason": reason}


def _concerns(goal: Goal, peer: str) -> bool:
    return goal.kind != "ratio" or goal.peer in (None, peer)


def _absent(package: str | None) -> str:
    """Why a package cannot be used, or "" where it can or none is needed."""
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else ""


def _usable(run: Run, session: Session) -> Iterator[tuple[str, Peer]]:
    case = run.case
    for name, peer in case.peers.items():
        if session.settings.device not in peer.devices:
            continue
        if why := _absent(peer.package):
            session.note_once(f"{case.op}: no peer {name}: {why} (pip install 'planmill[bench]')")
            goals = (goal for goal in case.goals_for(run.dtype) if goal.peer == name)
            session.missed += [(case, run.dtype, goal, why) for goal in goals]
            continue
        yield name, peer


def _check(
    run: Run, args: tuple, calls: dict[str, Callable[[], Any]], peers: dict[str, Peer]
) -> tuple[dict[str, float], int]:
    """The error of ours ("") and of every peer, and the bytes that ours returns."""
    errors: dict[str, float] = {}
    case = run.case
    if case.check is None:
        return errors, 0
    result = calls[""]()
    produced = nbytes(result)
    errors[""] = _judge_error(run, "ours", case.check(args, result), case.tolerance[run.dtype])
    for name, peer in peers.items():
        if not peer.yardstick:
            tolerance = case.tolerance[run.dtype] if peer.tolerance is None else peer.tolerance
            errors[name] = _judge_error(run, name, case.check(args, peer.finish(calls[name]())), tolerance)
    return errors, produced


def _judge_error(run: Run, name: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:  # NaN fails too
        where = f"{run.case.op} {run.case.id} {run.dtype_name}, {name}"
        raise WrongResult(f"{where}: error {error:.3g} against float64, at most {tolerance:.3g} allowed; not timed")
    return error


def _shared(run: Run, session: Session) -> Row:
    """The fields that do not depend on the peer; asked for while the instruction set and the threads are held."""
    case, settings = run.case, session.settings
    known = case.op in kernels.ops()
    ceiling = session.ceilings.get(run.dtype_name) or session.ceilings.get("float32")
    return {
        "op": case.op,
        "case": case.id,
        "dtype": run.dtype_name,
        "device": settings.device,
        "impl": kernels.which(case.op, settings.device).backend if known else "planmill",
        "gemm_flops_per_s": ceiling,
        "copy_bytes_per_s": session.ceilings.get("copy"),
        "commit": session.commit,
        "versions": machine.versions(settings.device, run.isa),
        "sweep": list(case.sweep) if case.sweep else None,
        "seed": settings.seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": settings.quick,
    }


def _memory(run: Run, session: Session, names: list[str]) -> dict[str, int]:
    """Extra bytes of ours and of the peers, each in a process of its own; what cannot be measured is noted."""
    settings = session.settings
    if not run.case.memory or settings.quick:
        return {}
    found = {}
    spec = {"file": run.case.file, "op": run.case.op, "case": run.case.id, "dtype": run.dtype_name}
    spec |= {"device": settings.device, "threads": settings.threads, "seed": settings.seed}
    spec["isa"] = run.isa if settings.device == "cpu" and run.isa in kernels.cpu_capabilities() else None
    for name in names:
        try:
            found[name] = measure(spec | {"peer": name})
        except MemoryUnknown as error:
            session.note_once(str(error))
        session.progress()
    return found


def steps(run: Run, settings: Settings) -> int:
    """How often `execute` calls `progress` at most."""
    return settings.rounds + (1 + len(run.case.peers) if run.case.memory and not settings.quick else 0)


def save(rows: list[Row], device: str, folder: Path = RESULTS) -> Path:
    """Append rows to <folder>/<machine>.jsonl; nothing that stands there is changed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.name(device)}.jsonl"
    with path.open("a") as file:
        file.writelines(to_json(row) + "\n" for row in rows)
    return path


def to_json(row: Row) -> str:
    """One line; numbers that JSON has not (NaN, infinity) become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)
