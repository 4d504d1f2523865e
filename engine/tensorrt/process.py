"""The side of a TensorRT build that survives: it starts the builder's process and judges what becomes of it."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from planmill.engine.errors import PlanError
from planmill.engine.tensorrt import builder
from planmill.engine.tensorrt.builder import Job, Report

_LOG = "builder.log"
_LINES = 6  # of the log that an error quotes
_MEMORY = re.compile(r"out of memory|OutOfMemory|bad_alloc|Cannot allocate|MemoryError|length_error", re.IGNORECASE)
_UNSUPPORTED = re.compile(r"No importer registered|Plugin not found|unsupported|Myelin", re.IGNORECASE)

_NOISE = re.compile(r"--- (Begin|End) node ---")

# What an error says -> the way out; the first that fits.
_WAYS = (
    (_MEMORY, "build on a machine with more memory, for fewer --sm, or a smaller largest size of --batch"),
    (re.compile(r"Turing"), "SM75 takes --precision fp16 only"),
    (_UNSUPPORTED, "write that step with other ops; for an op of Planmill's, build with the other of --plugins python "
     "and none"),
    (re.compile(r"cannot build for SM"), "leave it out of --sm; data-centre GPUs take --target tensorrt"),
    (re.compile(r"is not installed|cannot be loaded"), ""),
    (re.compile(r"no GPU|CUDA initialization|cudaGetDevice|no CUDA-capable|CUDA error", re.IGNORECASE),
     "this target builds on the GPU that the plan is for; --target tensorrt-rtx needs none"),
    (re.compile(r"profile"), "choose other sizes with --batch"),
)  # fmt: skip
_ANY_WAY = "build with other --plugins or another --precision, and report it with this message"


class Builder:
    """A builder's process, importing; `start` gives it its job. See `start_builder`."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self.process, self.folder = process, folder

    def start(self, job: Job) -> None:
        """Give it its job; `wait` must follow.

        Args:
            job: what to build.
        """
        path = self.folder / "job.json"
        path.write_text(json.dumps(asdict(job)))
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `wait` says of what
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()

    def wait(self, job: Job, *, timeout_s: float | None = None) -> Report:
        """Wait for the plan.

        Args:
            job: that it was given.
            timeout_s: how long to wait.

        Raises:
            PlanError: there is no plan: what the builder said, or what ended its process, with the lines of its log
                and the way out.
        """
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise PlanError(f"{_name(job)} did not finish within {timeout_s:g} s; {_ANY_WAY}") from None
        return _judge(job, self.process.returncode, read_log(self.folder))

    def build(self, job: Job, *, timeout_s: float | None = None) -> Report:
        """Build a plan and wait for it; see `start` and `wait`."""
        self.start(job)
        return self.wait(job, timeout_s=timeout_s)


@contextmanager
def start_builder(folder: Path) -> Iterator[Builder]:
    """Start a builder's process, which imports while its job is made; it ends with the block at the latest.

    Args:
        folder: for its files.
    """
    with (folder / _LOG).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", builder.__file__],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            cwd=folder,
        )
    try:
        yield Builder(process, folder)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_log(folder: Path) -> list[str]:
    """The lines of a builder's log."""
    return (folder / _LOG).read_text(errors="replace").splitlines()


def _judge(job: Job, code: int, log: list[str]) -> Report:
    report = _report(job)
    if code == 0 and report is not None and not report.error:
        return report
    quoted = _relevant(log)
    if code < 0:
        what = f"{_name(job)} was ended by {_signal(code)}"
    elif report is None:
        what = f"{_name(job)} ended with code {code} and left no report"
    else:
        what = f"{_name(job)} failed: {report.error}"
    if code == -signal.SIGKILL:
        way = "the system does that when memory runs out: build on a machine with more, or for fewer --sm"
    else:
        text = "\n".join([what, *quoted])
        way = next((way for pattern, way in _WAYS if pattern.search(text)), _ANY_WAY)
    log_says = f"; its log: {' | '.join(quoted)}" if quoted else ""
    raise PlanError(f"{what}{log_says}" + (f": {way}" if way else ""))


def _report(job: Job) -> Report | None:
    try:
        return Report(**json.loads(Path(job.report).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _relevant(log: list[str]) -> list[str]:
    """Errors of the log, without repeats; where there are none, its last lines."""
    log = [line.strip()[:400] for line in log if line.strip() and not _NOISE.search(line)]
    errors = list(dict.fromkeys(line for line in log if line.startswith(("[E]", "[I]", "MemoryError"))))
    return (errors or log)[-_LINES:]


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _name(job: Job) -> str:
    return {"tensorrt_rtx": "the TensorRT-RTX builder", "tensorrt": "the TensorRT builder"}[job.library]
