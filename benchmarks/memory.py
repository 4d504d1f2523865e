"""Peak extra memory of a call, beyond its inputs and outputs, measured in a fresh process.

On the CPU the kernel's own high-water mark is used (VmHWM, set back before the call), not a poll that could miss a
short peak. What is no working memory of the call is kept out: its code pages (RssFile), the thread stacks and
libraries' tables (a small call of the same kind runs first), and memory that the allocator holds but nobody uses
(every block above 64 KiB is mapped and unmapped by itself in the child, and the heap is trimmed first).
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

_CHILD = "from planmill.cli.bench import load_benchmarks; load_benchmarks().memory.main()"


class MemoryUnknown(RuntimeError):
    """The child process could not measure; the message says why."""


def nbytes(value: Any) -> int:
    """Bytes of the tensors and arrays in nested tuples and lists."""
    if isinstance(value, torch.Tensor | numpy.ndarray):
        return int(value.nbytes)
    return sum(nbytes(item) for item in value) if isinstance(value, list | tuple) else 0


def extra_bytes(call: Callable[[], Any], warm_up: Callable[[], Any], device: str = "cpu") -> int:
    """Peak memory that `call` takes beyond what is there before it and what it returns.

    Args:
        call: run once.
        warm_up: run twice before: a small call of the same kind.
        device: "cpu" or "cuda".
    """
    for _ in range(2):
        warm_up()
    gc.collect()
    if device == "cuda":
        return _on_cuda(call)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status()
    result = call()
    after = _status()
    peak = after["VmHWM"] - after["RssFile"] - after["RssShmem"]
    return max(0, peak - before["RssAnon"] - nbytes(result))


def _on_cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - nbytes(result))


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts[-1] == "kB"}


def measure(spec: dict[str, Any]) -> int:
    """`extra_bytes` of ours or a peer in a fresh process.

    Args:
        spec: file ("family/file"), op, case, dtype, device, peer ("" for ours), threads, isa, seed.

    Raises:
        MemoryUnknown: the child failed, or this system does not tell.
    """
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _CHILD, json.dumps(spec)]
    done = subprocess.run(command, env={**os.environ, **fixed}, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryUnknown(f"memory of {spec['op']} {spec['case']} {spec['peer'] or 'ours'}: {reason}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The child: one case, one implementation, one number on standard output."""
    from planmill import kernels

    from .cases import DTYPES, Draw, select
    from .machine import limited

    spec = json.loads(sys.argv[1])
    case = next(case for case in select(spec["file"]) if (case.op, case.id) == (spec["op"], spec["case"]))
    prepare = case.peers[spec["peer"]].prepare if spec["peer"] else lambda *args: lambda: case.ours(*args)
    draw = Draw(DTYPES[spec["dtype"]], spec["device"], torch.Generator().manual_seed(spec["seed"]))
    call = prepare(*case.make(draw))
    warm_up = prepare(*(case.small or case.make)(draw))
    with limited(spec["threads"]), kernels.cpu_capability(spec["isa"]) if spec["isa"] else limited(None):
        print(json.dumps(extra_bytes(call, warm_up, spec["device"])))
