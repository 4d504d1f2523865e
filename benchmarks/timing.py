"""Time: calls alternated in one process, so that whatever the machine does meanwhile falls on all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

PAUSE_S = 0.01  # thread pools of different libraries spin for some milliseconds after their work: let them sleep


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds per call."""

    p20: float
    p50: float
    p80: float
    p99: float

    @classmethod
    def of(cls, samples: list[float]) -> "Quantiles":
        return cls(*(float(q) for q in numpy.percentile(samples, [20, 50, 80, 99])))


@dataclass(frozen=True)
class Sampler:
    """Times one call on a device.

    Args:
        device: "cpu" (host clock) or "cuda" (device events, the L2 cache emptied before).
        calls: calls per sample; the sample is divided by it. Where it is more than one, a quarter as many run before
            the clock starts: the pool that worked before spins on, and the threads of this one are asleep.
        reports_ms: the call returns its time itself.
    """

    device: str = "cpu"
    calls: int = 1
    reports_ms: bool = False

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.reports_ms:
            return float(call())
        if self.device == "cuda":
            return self._on_cuda(call)
        if self.calls == 1:
            time.sleep(PAUSE_S)
        for _ in range(self.calls // 4):
            call()
        start = time.perf_counter()
        for _ in range(self.calls - 1):
            call()
        result = call()  # what it returns is freed after the clock has stopped
        end = time.perf_counter()
        del result
        return (end - start) * 1e3 / self.calls

    def _on_cuda(self, call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Wider than any L2; writing it also keeps the device busy while the host queues the call.
        torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()
        begin.record()
        for _ in range(self.calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.calls


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    sampler: Sampler,
    rounds: int,
    budget_s: float,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Samples of every call in turns, in milliseconds; each round starts with another of them and shuffles the rest.

    Args:
        calls: what to time, by name; each is called twice before the first sample.
        rounds: at least this many.
        budget_s: more rounds follow, up to eleven times as many, while this much time has not passed.
        progress: called after each of the first `rounds`.
    """
    names = list(calls)
    for name in names:
        for _ in range(2 * sampler.calls):
            calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(11 * rounds):
            if done >= rounds and time.perf_counter() - started > budget_s:
                break
            for name in _order(names, done):
                samples[name].append(sampler(calls[name]))
            if done < rounds:
                progress()
    finally:
        if collects:
            gc.enable()
    return samples


def _order(names: list[str], done: int) -> list[str]:
    """A call that always follows the same other one finds what that one left: caches, spinning threads."""
    first = names[done % len(names)]
    rest = [name for name in names if name != first]
    random.Random(done).shuffle(rest)
    return [first, *rest]
