"""Where the time of a call goes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from planmill.engine.errors import PlanError

_STAGE = "planmill: "


@dataclass(frozen=True)
class ProfileRow:
    """One stage of the session, or one kernel inside the payload, as means over the calls.

    Args:
        name: of the stage, or of the kernel as PyTorch or Inductor calls it.
        count: how often a call runs it.
        time_ms: of its own per call: of a stage everything in it, of a kernel without what it calls.
        share: of the call's time.
    """

    name: str
    count: float
    time_ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What `Session.profile` found.

    Args:
        calls: measured.
        time_ms: of one call, measured under the profiler, which slows small kernels down.
        stages: the session's own, in order; they make up the call.
        kernels: of the call, longest first. Native code that reports nothing to PyTorch's profiler is the
            difference between their sum and the stage "payload".
    """

    calls: int
    time_ms: float
    stages: list[ProfileRow]
    kernels: list[ProfileRow]

    def __str__(self) -> str:
        rows = [*self.stages, *self.kernels]
        width = max([len(row.name) for row in rows] + [5])
        lines = [f"{'stage':<{width}}  {'runs':>6}  {'ms':>9}  {'share':>6}"]
        for row in rows:
            lines.append(f"{row.name:<{width}}  {row.count:>6g}  {row.time_ms:>9.4f}  {row.share:>6.1%}")
            if row is self.stages[-1]:
                lines.append("-" * len(lines[0]))
        return "\n".join(lines)


def profile_calls(call: Callable[[], None], repeat: int, trace: str | os.PathLike[str] | None) -> Profile:
    """Run `call` under PyTorch's profiler; its `record_function` blocks named "planmill: ..." are the stages.

    Raises:
        PlanError: `repeat` is not positive, or the trace cannot be written.
    """
    if repeat < 1:
        raise PlanError(f"profile: repeat must be positive, got {repeat}")
    path = None if trace is None else Path(trace)
    if path is not None and (path.suffix != ".json" or path.is_dir() or not path.absolute().parent.is_dir()):
        raise PlanError(f"{path}: a trace is a .json file in a directory that exists")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(repeat):
            call()
    if path is not None:
        recorded.export_chrome_trace(str(path))
    events = recorded.key_averages()
    stages = [event for event in events if event.key.startswith(_STAGE)]
    total = sum(event.cpu_time_total for event in stages)

    def row(event, micros: float) -> ProfileRow:
        name = event.key.removeprefix(_STAGE)
        return ProfileRow(name, event.count / repeat, micros / repeat / 1e3, micros / total if total else 0.0)

    kernels = [row(event, event.self_cpu_time_total) for event in events if not event.key.startswith(_STAGE)]
    return Profile(
        calls=repeat,
        time_ms=total / repeat / 1e3,
        stages=[row(event, event.cpu_time_total) for event in stages],
        kernels=sorted(kernels, key=lambda kernel: kernel.time_ms, reverse=True),
    )
